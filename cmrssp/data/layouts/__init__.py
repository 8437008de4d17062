"""One module for each layout of files."""
