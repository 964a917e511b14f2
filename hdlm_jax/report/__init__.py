"""Pages and tables that show runs."""
