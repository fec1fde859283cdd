"""Processes for tests that need many: forks of one that has imported TensorFlow, which takes 2 s.

From there on they are what `conftest.start` starts: a script, or Python's -c, with its flags and
environment, that can be suspended, interrupted and killed. How a script itself starts, and what
TensorFlow does meanwhile, is tested with `conftest.start` and `conftest.python`.
"""

import functools
import itertools
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT


@functools.cache
def fork_server():
    """The standard library's fork server: it imports TensorFlow, and then forks."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['forked', 'extras.replica'])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join(sys.path))  # where it finds these modules
        multiprocessing.forkserver.ensure_running()
    return context


def start(*arguments, cwd=ROOT, env=ENVIRONMENT):
    """Starts a Python process, its output and errors in pipes, like `conftest.start`."""
    return Process([*map(str, arguments)], cwd, env)


class Process:
    """Looks like a subprocess.Popen, in what the tests use of that.

    What it prints has to have room in a pipe.
    """

    def __init__(self, arguments, folder, environment):
        pipes = [fork_server().Pipe(duplex=False) for _ in range(2)]
        self.process = fork_server().Process(target=run, daemon=True, args=(
            arguments, folder, environment, [writer for _, writer in pipes]))
        self.process.start()
        self.pid, self.kill, self.terminate = (
            self.process.pid, self.process.kill, self.process.terminate)
        self.stdout, self.stderr = (os.fdopen(os.dup(reader.fileno())) for reader, _ in pipes)
        for end in itertools.chain(*pipes):
            end.close()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.process), timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()


def run(arguments, folder, environment, writers):
    """Does in the fork what a Python command line with these arguments would do."""
    for number, writer in enumerate(writers, 1):
        os.dup2(writer.fileno(), number)
        writer.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if arguments[0] == '-c':
        sys.argv = ['-c', *arguments[2:]]
        exec(arguments[1], {'__name__': '__main__'})
    elif arguments[0] == '-m':
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name='__main__', alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name='__main__')
