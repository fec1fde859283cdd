"""Python processes with TensorFlow loaded, which takes three seconds: they are forked from one that
has done nothing else with it. What is about the loading itself is tested with real starts.
"""

import multiprocessing.reduction
import os
import pathlib
import runpy
import sys
import threading

FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['forks', 'extras.replica', 'extras.predict'])
TESTS = pathlib.Path(__file__).resolve().parent
os.environ['PYTHONPATH'] = f'{TESTS}:{TESTS.parent}'  # where it finds them


class Fork(FORKS.Process):
    """A process, with what the tests ask of subprocess.Popen."""

    def __init__(self, *arguments, cwd, env, own_session=False):
        pipes = [os.pipe() for _ in range(2)]
        super().__init__(daemon=True, target=become, args=(
            arguments, cwd, env, own_session,
            [multiprocessing.reduction.DupFd(write) for _, write in pipes]))
        super().start()
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


def become(arguments, cwd, environment, own_session, pipes):
    """Goes on as `python` does with these arguments: -c, -m, or a script."""
    for number, pipe in enumerate(pipes, 1):
        os.dup2(pipe.detach(), number)
    if own_session:
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
