"""Methods that train several times over."""
