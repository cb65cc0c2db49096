"""Every speed and quality claim of the README as a command, beside the physical limit."""
