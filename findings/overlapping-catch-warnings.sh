#!/usr/bin/env bash
# Guess:    two threads that each run `with warnings.catch_warnings(): warnings.simplefilter("ignore")` leave the filters
#           of the process as they were once both are done.
# Happens:  the context saves and restores filters of the whole process. Where A enters, B enters, A leaves, B leaves, B
#           puts back what A had set: every warning of the process is ignored from then on.
# Seen with CPython 3.11 (the interpreter that runs the script; no package is needed), so torch loaders that silence
# foreign warnings in threads can silence all of them.
set -euo pipefail
python3 - <<'PY'
import sys
import threading
import warnings

steps = [threading.Event() for _ in range(3)]


def first():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps[0].set()
        steps[1].wait()
    steps[2].set()


def second():
    steps[0].wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps[1].set()
        steps[2].wait()


before = list(warnings.filters)
threads = [threading.Thread(target=work) for work in (first, second)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("python", sys.version.split()[0], "- filter in front:", warnings.filters[0][:3:2])
expected = ("ignore", Warning) if sys.version_info < (3, 14) else before[0][:3:2]
assert warnings.filters[0][:3:2] == expected, "this has changed"
print("as described")
PY
