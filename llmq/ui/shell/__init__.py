"""Launches the page: its layout, theme and files, the settings in its address, and the state all visitors share."""
