"""The native runtime: a C++ library without torch or Python that runs the plan of a network (`growfx.h`)."""
