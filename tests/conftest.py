"""What the tests share: the real data, a real HTTP server, and real processes."""

import collections
import contextlib
import fcntl
import gzip
import http.server
import os
import pathlib
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest

os.environ['OPENBLAS_NUM_THREADS'] = '1'  # more would wait in loops that take the other tests' time

import numpy as np
from forks import Fork

import input_data

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = ROOT / 'MNIST_data'
NAMES = tuple(f'{name}.gz' for name in input_data._FILES)
os.environ['no_proxy'] = '127.0.0.1'
# A shell's background job ignores Ctrl-C, and after nohup a hangup is ignored, too; so would all
# processes do that the tests start from there.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
ENVIRONMENT = {name: value for name, value in os.environ.items()  # as on most machines
               if not name.startswith('TF_') and name not in ('PYTHONPATH', 'PYTHONUNBUFFERED')}
FIRST_LINES = ('import input_data\n'  # of the scripts of others, as the guide has them
               'import tensorflow.compat.v1 as tf; tf.disable_v2_behavior()\n')


def idx(array):
    """What an IDX file of a uint8 array holds."""
    return struct.pack(f'>{1 + array.ndim}I', 2048 + array.ndim, *array.shape) + array.tobytes()


def write_idx(path, array):
    """Writes a uint8 array as an IDX file, gzipped if the path says so."""
    path.write_bytes(gzip.compress(idx(array)) if path.suffix == '.gz' else idx(array))


def write_data_set(folder, train=60, test=20, side=(9, 7), classes=10, suffix='.gz'):
    """Writes a small data set of random images under MNIST's names."""
    folder.mkdir(exist_ok=True)
    random = np.random.RandomState(0)
    for part, count in (('train', train), ('t10k', test)):
        write_idx(folder / f'{part}-images-idx3-ubyte{suffix}',
                  random.randint(0, 256, (count, *side)).astype(np.uint8))
        write_idx(folder / f'{part}-labels-idx1-ubyte{suffix}',
                  (np.arange(count) % classes).astype(np.uint8))
    return folder


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; for each file name, `faults` has what goes wrong in the next requests.

    A fault is a status code, or one of 'cut', 'stall', 'html', 'wrong', 'no length', 'endless'.
    """

    daemon_threads = True

    def __init__(self, folder=DATA):
        self.folder, self.requests = folder, []
        self.faults = collections.defaultdict(list)
        self.stalled, self.over = threading.Event(), threading.Event()
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}/'

    def handle_error(self, request, client_address):
        """A client that goes away is part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request as its server's faults say."""

    def do_GET(self):
        server, name = self.server, self.path.lstrip('/')
        server.requests.append(name)
        fault = server.faults[name].pop(0) if server.faults[name] else None
        if isinstance(fault, int):
            return self.send_error(fault)
        body = (server.folder / name).read_bytes()
        if fault == 'html':
            body = b'<!DOCTYPE html><html><title>Log in to this network</title></html>'
        elif fault == 'wrong':  # a whole IDX file of the right kind, but other digits
            array = input_data._read_idx((server.folder / name).open('rb'), name)
            body = gzip.compress(idx(array[::-1] // 2), 1)
        self.send_response(200)
        if fault not in ('no length', 'endless'):
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if fault in ('cut', 'stall'):
            self.wfile.write(body[:len(body) // 2])
            server.stalled.set()
            if fault == 'stall':
                server.over.wait(60)
            return None
        while fault == 'endless':  # until the client goes away
            self.wfile.write(body)
        return self.wfile.write(body)

    def log_message(self, *args):
        """Nothing on the tests' screen."""


@pytest.fixture(autouse=True)
def usual_signals():
    """Undoes what a script that was run in this process does to signals."""
    usual = {number: signal.getsignal(number)
             for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in usual.items():
        signal.signal(number, handler)


@pytest.fixture
def server():
    """A server of the real files on loopback."""
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.over.set()
        running.shutdown()


@pytest.fixture
def mirrors(server, monkeypatch):
    """The server in the place of the default mirrors, and no waiting between the rounds."""
    monkeypatch.setattr(input_data, '_MIRRORS', (server.url,))
    monkeypatch.setattr(input_data, '_PAUSES', (0, 0, 0))
    monkeypatch.setattr(input_data, '_TIMEOUT', 2)  # a busy machine answers within it
    return server


@pytest.fixture(scope='session')
def few_digits(tmp_path_factory):
    """A folder with MNIST's first 6,000 and 250 digits, for runs whose accuracy doesn't matter."""
    folder = tmp_path_factory.mktemp('few_digits')
    for name in NAMES:
        with open(DATA / name, 'rb') as f:
            array = input_data._read_idx(f, name)
        write_idx(folder / name, array[:6000 if 'train' in name else 250])
    return folder


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A model folder, and what the run of 120 steps printed; one for all of pytest's workers.

    Beside the folder, trained.kilobytes has the most memory that it took.
    """
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        shared = shared.parent
    folder, printed = shared / 'trained', shared / 'trained.txt'
    with open(shared / 'trained.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait here for the first one
        if not printed.exists():
            kilobytes, result = peak_kilobytes(
                'mnist_deep.py', '--max_steps=120', '--seed=1', '--model_dir', folder,
                '--learning_rate=1e-3', '--save_checkpoints_steps=50')
            assert (result.returncode, result.stderr) == (0, '')
            (shared / 'trained.kilobytes').write_text(str(kilobytes))
            printed.write_text(result.stdout)
    return folder, printed.read_text()


TENSORFLOWS_OWN = re.compile(
    r'[IWEF]\d{4} \d\d:\d\d:\d\d.*\n'  # such as "I0000 00:00:1795646576.76 5306 port.cc:153] ..."
    r'|WARNING: All log messages before absl::InitializeLog\(\) is called .*\n'
    r'|Additional GRPC error information from remote target .*\n|:(UNKNOWN:|\{"created":).*\n'
    r'|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: [IWEF] \S+\.cc:\d+\] .*\n')


def own_lines(errors):
    """What a process wrote on standard error, without what TensorFlow says by itself."""
    return re.sub(f'^({TENSORFLOWS_OWN.pattern})', '', errors, flags=re.MULTILINE)


def next_line(process):
    """The next line of a process's standard error that is not TensorFlow's own."""
    line = process.stderr.readline()
    while line and not own_lines(line):
        line = process.stderr.readline()
    return line


def python(*arguments, **options):
    """Runs a Python process to its end; its result, standard error as `own_lines` has it."""
    result = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True,
                            check=False,
                            **{'cwd': ROOT, 'env': ENVIRONMENT, 'timeout': 300, **options})
    result.stderr = own_lines(result.stderr)
    return result


def start(*arguments, **options):
    """Starts a Python process, its output and errors in pipes."""
    return subprocess.Popen([sys.executable, *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            **{'cwd': ROOT, 'env': ENVIRONMENT, **options})


def fork(*arguments, **options):
    """Starts a Python process as `start` does, with TensorFlow loaded."""
    return Fork(*map(str, arguments), **{'cwd': ROOT, 'env': ENVIRONMENT, **options})


def until(condition, process):
    """Waits for something that a process does."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def watch_batches(monkeypatch, event=lambda number: None):
    """Notes the training minibatches that are drawn, and lets something happen at each one.

    Args:
        event: called with a batch's number, from 0 on.

    Returns:
        dict, data set -> list of its batches' labels, as lists.
    """
    draw, drawn = input_data.DataSet.next_batch, {}

    def next_batch(self, batch_size, fake_data=False, shuffle=True):
        batch = draw(self, batch_size, fake_data, shuffle)
        if shuffle:
            event(sum(map(len, drawn.values())))
            drawn.setdefault(self, []).append(batch[1].tolist())
        return batch
    monkeypatch.setattr(input_data.DataSet, 'next_batch', next_batch)
    return drawn


class Disk:
    """The folder "model" of a test on a small disk of its own, which can be full.

    Only root can make a disk. For others, the kernel refuses to let a file grow, as it would there.
    """

    def __init__(self, folder):
        folder.mkdir()
        self.folder = folder
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.is_mounted = subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', 'size=250m', 'tmpfs', folder],
            capture_output=True, check=False).returncode == 0
        self.reason = 'No space left on device' if self.is_mounted else 'File too large'

    def fill(self):
        if not self.is_mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, self.limits[1]))
            return
        with contextlib.suppress(OSError), open(self.folder / '.filler', 'wb', 0) as filler:
            while True:
                filler.write(bytes(1 << 16))

    def empty(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        (self.folder / '.filler').unlink(missing_ok=True)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Lets files grow again, see `Disk`, before pytest writes how the test has ended."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        return (yield)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def disk(tmp_path):
    """A `Disk`; the test's folder "model" is on it."""
    disk = Disk(tmp_path / 'model')
    yield disk
    disk.empty()
    if disk.is_mounted:
        subprocess.run(['umount', '-l', disk.folder], check=True)


def peak_kilobytes(*arguments, **options):
    """The most memory that a Python process takes, and its result."""
    # Measured from a small process: a child's peak begins with what its parent has.
    result = python('-c', 'import resource, subprocess, sys\n'
                    'code = subprocess.run([sys.executable, *sys.argv[1:]]).returncode\n'
                    'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n'
                    'sys.exit(code)', *arguments, **options)
    *lines, kilobytes = result.stdout.splitlines(keepends=True)
    result.stdout = ''.join(lines)
    return int(kilobytes), result


@pytest.fixture
def moments(request):
    """A random.Random for the moments of kills; a failed test shows its seed."""
    seed = int(os.environ.get('TEST_SEED') or time.time_ns())
    request.node.add_report_section('call', 'to repeat its moments', f'TEST_SEED={seed}')
    return random.Random(seed)
