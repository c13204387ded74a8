"""`growfx zoo`: what works on every model of the zoo."""
