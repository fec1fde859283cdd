"""Python processes that have TensorFlow loaded already, which takes each one three seconds.

The standard library's fork server loads it once; each process is forked from that one, which has
done nothing else. They are processes like all others, with signals, kills and exit codes of their
own. What is about starting and ending Python itself is tested with real starts (`conftest.start`).
"""

import atexit
import contextlib
import multiprocessing.forkserver
import multiprocessing.reduction
import os
import pathlib
import runpy
import sys
import threading

FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['forks', 'extras.replica', 'extras.predict'])
TESTS = pathlib.Path(__file__).resolve().parent


@atexit.register
def kill_the_last():
    """Ends those that a failed test has left; a SIGTERM, as by multiprocessing, they may hold back.
    """
    for process in multiprocessing.active_children():
        process.kill()


class Fork(FORKS.Process):
    """A Python process, with what the tests ask of a subprocess.Popen.

    Args:
        arguments: as after `python`: -c and code, -m and a module, or a script; then its own.
        cwd, env: its working folder and environment.
        start_new_session: whether signals to the tests' process group do not reach it.
    """

    def __init__(self, *arguments, cwd, env, start_new_session=False):
        pipes = [os.pipe() for _ in range(2)]
        super().__init__(daemon=True, target=become_python, args=(
            arguments, cwd, env, start_new_session,
            [multiprocessing.reduction.DupFd(write) for _, write in pipes]))
        start_server()
        self.start()
        for _, write in pipes:
            os.close(write)
        self.stdout, self.stderr = (os.fdopen(read) for read, _ in pipes)

    returncode = property(lambda self: self.exitcode)

    def poll(self):
        return self.exitcode

    def wait(self, timeout=None):
        self.join(timeout)
        assert self.exitcode is not None, f'it goes on after {timeout} s'
        return self.exitcode

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):  # it has just ended: no error for Popen, too
            os.kill(self.pid, number)

    def communicate(self, timeout=300):
        said = {}
        readers = [threading.Thread(target=lambda pipe=pipe: said.update({pipe: pipe.read()}),
                                    daemon=True) for pipe in (self.stdout, self.stderr) if pipe]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return said.get(self.stdout), said.get(self.stderr)


def start_server():
    """Starts the fork server, unless it runs; it alone has this PYTHONPATH."""
    usual = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = f'{TESTS}:{TESTS.parent}'
    multiprocessing.forkserver.ensure_running()
    del os.environ['PYTHONPATH']
    if usual is not None:
        os.environ['PYTHONPATH'] = usual


def become_python(arguments, cwd, environment, start_new_session, pipes):
    """What a fork does: it goes on as `python` would with these arguments."""
    for number, pipe in enumerate(pipes, 1):
        os.dup2(pipe.detach(), number)
    sys.stdout, sys.stderr = open(1, 'w'), open(2, 'w', 1)  # noqa: SIM115 (until it ends)
    if start_new_session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    way, *sys.argv = arguments
    if way == '-c':
        exec(sys.argv[0], {'__name__': '__main__'})
    elif way == '-m':
        sys.modules.pop(sys.argv[0], None)
        runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
    else:
        sys.argv.insert(0, way)
        runpy.run_path(way, run_name='__main__')
