"""The native runtime: a C++ library with a C interface that runs the plan of a network without torch or Python."""
