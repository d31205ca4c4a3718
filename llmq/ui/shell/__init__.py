"""What the page stands on: its theme and files, the settings in its address, the state all visitors share."""
