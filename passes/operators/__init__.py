"""The names and families of operators that several passes share."""
