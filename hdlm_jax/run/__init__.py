"""Everything that touches devices, disks and time."""
