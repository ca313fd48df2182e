"""Which lines of a script's functions no process has executed: those are the lines that may fail at their first use."""

import linecache
import os
import sys
import threading
import types


def watch(paths):
    """From now on note the lines of `paths` that this process executes: a set that grows, of (path, line)."""
    paths, executed = set(map(os.path.abspath, paths)), set()

    def in_file(frame, event, argument):
        executed.add((frame.f_code.co_filename, frame.f_lineno))
        return in_file

    def in_process(frame, event, argument):
        return in_file if frame.f_code.co_filename in paths else None

    sys.settrace(in_process)
    threading.settrace(in_process)
    return executed


def unexecuted(path, executed):
    """The numbers of the lines in the functions of the script `path` that are not in `executed`, {(path, line)}."""
    path = os.path.abspath(path)
    with open(path, encoding="utf-8") as file:
        codes, lines = [compile(file.read(), path, "exec")], set()
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        if code.co_flags & 2:  # of a function: the lines of modules and classes run at import
            lines |= {line for *_, line in code.co_lines() if line and line > code.co_firstlineno}
    return sorted(line for line in lines if (path, line) not in executed)


def print_unexecuted(paths, executed):
    found = [(path, line) for path in paths for line in unexecuted(path, executed)]
    print(f"lines that were not executed, {len(found)}:")
    for path, line in found:
        print(f"{os.path.basename(path)}:{line}: {linecache.getline(path, line).strip()}")
