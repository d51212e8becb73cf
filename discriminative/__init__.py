"""The library of Discriminative Class Tokens. It knows nothing of the command line."""

VERSION = "0.4.0"  # written into every token file
