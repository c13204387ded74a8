"""Graph transformations and analyses, one a file, each a plain function named after what it does."""
