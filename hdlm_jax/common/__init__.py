"""What every room stands on: JSON, locks, the console, devices and processes."""
