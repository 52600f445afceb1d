"""The command line. Nothing here imports torch or the core until a command needs it: help answers at once."""
