"""The components of the page and the scripts that draw them; each is given a plain value."""
