"""Cuts each task of a cluster off for a while, and shows that the training goes on and ends.

    sudo .venv/bin/python -m benchmarks.broken_network

Three tasks, a ps and two workers, run in three network namespaces of their own, joined by a bridge.
In each of six trainings, one of them loses its link for 25 seconds: each task in turn, without and
with --sync_replicas. A line says how each training ended and how long after the cut; the exit code
is 1 if one did not end well. Needs Linux, root, and the command `ip` (Debian's package iproute2).
Nothing leaves the machine, and the namespaces are removed in the end.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TASKS = [('ps', 0), ('worker', 0), ('worker', 1)]
ADDRESSES = ['10.123.45.1:2222', '10.123.45.2:2222', '10.123.45.3:2222']
BRIDGE, SPACES, LINKS = 'mnist-br', ['mnist-0', 'mnist-1', 'mnist-2'], ['mn0', 'mn1', 'mn2']
CUT_OFF = 25  # seconds
PATIENCE = 600  # seconds until a training counts as one that hangs


def ip(command, **options):
    """Runs a command of `ip`."""
    subprocess.run(['ip', *command.split()], check=True, **options)


@contextlib.contextmanager
def network():
    """Three namespaces, each with an address on the same bridge."""
    remove_network()
    try:
        ip(f'link add {BRIDGE} type bridge')
        ip(f'link set {BRIDGE} up')
        for space, link, address in zip(SPACES, LINKS, ADDRESSES):
            ip(f'netns add {space}')
            ip(f'link add {link} type veth peer name eth0 netns {space}')
            ip(f'link set {link} master {BRIDGE} up')
            ip(f'-n {space} addr add {address.split(":")[0]}/24 dev eth0')
            ip(f'-n {space} link set eth0 up')
            ip(f'-n {space} link set lo up')
        yield
    finally:
        remove_network()


def remove_network():
    """Removes what `network` makes, if it is there."""
    for command in [f'netns delete {space}' for space in SPACES] + [f'link delete {BRIDGE}']:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip(command, stderr=subprocess.DEVNULL)


def start(number, folder, flags):
    """Starts a task in its namespace."""
    job, index = TASKS[number]
    config = {'cluster': {'ps': ADDRESSES[:1], 'worker': ADDRESSES[1:]},
              'task': {'type': job, 'index': index}}
    return subprocess.Popen(
        ['ip', 'netns', 'exec', SPACES[number], sys.executable, '-m', 'extras.replica',
         '--model_dir', folder, '--batch_size=10', '--save_checkpoints_steps=100', *flags],
        cwd=ROOT, env={**os.environ, 'TF_CONFIG': json.dumps(config)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def train(cut, flags):
    """One training, in which the task of number `cut` is cut off; returns what happened."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = [start(number, folder, flags) for number in range(len(TASKS))]
        try:
            chief = tasks[1]
            while not any(name.endswith('.index') for name in os.listdir(folder)):
                if chief.poll() is not None:
                    return f'the chief ended with code {chief.returncode}', False
                time.sleep(0.1)
            ip(f'link set {LINKS[cut]} down')
            began = time.monotonic()
            time.sleep(CUT_OFF)
            ip(f'link set {LINKS[cut]} up')
            try:
                last = chief.communicate(timeout=PATIENCE)[0].splitlines()[-1:]
                codes = [task.wait(60) for task in tasks]
            except subprocess.TimeoutExpired:
                return 'hangs', False
            seconds = time.monotonic() - began
            good = codes == [0, 0, 0] and last and last[0].startswith('test accuracy')
            return f'{"".join(last)}, exit codes {codes}, {seconds:.0f} s after the cut', good
        finally:
            for task in tasks:
                task.kill()
                task.wait()


def main():
    """Runs the six trainings; returns the exit code."""
    all_good = True
    with network():
        for flags in ([], ['--sync_replicas']):
            for cut, (job, index) in enumerate(TASKS):
                # Long enough that some steps are left after the cut.
                result, good = train(cut, ['--max_steps=1500', *flags])
                all_good &= good
                print(f'{job} {index} cut off, {" ".join(flags) or "asynchronous"}: {result}',
                      flush=True)
    return 0 if all_good else 1


if __name__ == '__main__':
    sys.exit(main())
