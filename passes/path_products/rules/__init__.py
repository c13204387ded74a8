"""The path rule of every operator, by kind of operator."""
