"""The connectivity rule of every operator, by kind of operator."""
