"""The command line: thin commands over the other rooms. Importing it loads neither torch nor a model."""
