"""One module per verb of the command line, and what they share. They parse, call the library and print; no more."""
