"""Part four of the tutorial: many workers, and what happens when one of them dies."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import time

import numpy as np
import psutil
import pytest
from conftest import ENVIRONMENT, ROOT, own_line, own_lines, python, start

import mnist_deep
import mnist_predict
import mnist_replica

tf = mnist_deep.tf


class Cluster:
    """Tasks of a cluster as processes, each with its TF_CONFIG, on free ports of loopback."""

    def __init__(self, workers, flags):
        self.flags, self.processes = flags, []
        free = [socket.create_server(('127.0.0.1', 0)) for _ in range(1 + workers)]
        addresses = [f'127.0.0.1:{bound.getsockname()[1]}' for bound in free]
        for bound in free:
            bound.close()
        self.addresses = {'ps': addresses[:1], 'worker': addresses[1:]}

    def start(self, job, index=0, *flags):
        config = json.dumps({'cluster': self.addresses, 'task': {'type': job, 'index': index}})
        process = start('mnist_replica.py', *self.flags, *flags,
                        env={**ENVIRONMENT, 'TF_CONFIG': config})
        self.processes.append(process)
        return process

    def end(self):
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def cluster(tmp_path, few_digits):
    """Makes clusters that keep their network in the test's folder."""
    made = []

    def make(workers, steps, *flags):
        made.append(Cluster(workers, [
            '--max_steps', steps, '--seed=1', '--batch_size=5', '--data_dir', few_digits,
            '--model_dir', tmp_path / 'model', '--save_checkpoints_steps=10', *flags]))
        return made[-1]
    yield make
    for one in made:
        one.end()


def until(condition, process):
    """Waits for something that a process does."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def newest(folder):
    """The step of a folder's newest checkpoint, -1 if it has none."""
    return max((int(path.stem.rsplit('-', 1)[1])
                for path in folder.glob('mnist_deep.ckpt-*.index')), default=-1)


def checkpoint_after(folder, step):
    """Whether a folder has a checkpoint of a later step, to be asked again and again."""
    return lambda: newest(folder) > step


def joined(process):
    """The step at which a worker has joined."""
    return int(re.fullmatch(r'worker \d joins at step (\d+)\n', own_line(process))[1])


def last_step(folder):
    return int(tf.train.latest_checkpoint(folder).rsplit('-', 1)[1])


def weights(folder):
    reader = tf.train.load_checkpoint(str(folder))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


# On this machine

@pytest.mark.parametrize('steps, mode', [(120, []), (60, ['--sync_replicas'])])
def test_a_local_cluster_trains_shows_the_tutorials_lines_and_leaves_nothing(steps, mode, tmp_path,
                                                                             few_digits):
    flags = ['--seed=1', '--data_dir', few_digits, '--model_dir', tmp_path]
    result = python('mnist_replica.py', '--workers=2', '--batch_size=20', '--max_steps', steps,
                    *mode, *flags)
    assert (result.returncode, result.stderr) == (0, '')
    *lines, last = result.stdout.splitlines()
    shown = [re.fullmatch(r'step (\d+), training accuracy [01](\.\d+)?', line) for line in lines]
    assert [int(match[1]) // 100 for match in shown] == list(range(1 + steps // 100))
    assert float(re.fullmatch(r'test accuracy (0\.\d+)', last)[1]) > 0.5
    assert last_step(tmp_path) == steps if mode else last_step(tmp_path) in (steps, steps + 1)
    assert not [process for process in psutil.process_iter(['cmdline'])
                if str(tmp_path) in str(process.info['cmdline'])]


TWELVE = ['--seed=3', '--max_steps=12']


@pytest.fixture(scope='module')
def alone(tmp_path_factory, few_digits):
    """A folder after 12 steps of mnist_deep.py, and what it printed."""
    folder = tmp_path_factory.mktemp('alone')
    result = python('mnist_deep.py', *TWELVE, '--data_dir', few_digits, '--model_dir', folder)
    return folder, result.stdout


@pytest.mark.parametrize('mode', [[], ['--sync_replicas']])
def test_one_worker_learns_what_mnist_deep_learns(mode, alone, tmp_path, few_digits):
    folder, printed = alone
    one = python('mnist_replica.py', '--workers=1', *mode, *TWELVE, '--data_dir', few_digits,
                 '--model_dir', tmp_path)
    assert one.stdout == printed
    expected, found = weights(folder), weights(tmp_path)
    assert expected.keys() == found.keys()
    for name in expected:
        assert np.allclose(expected[name], found[name], atol=1e-5), name


def test_each_script_goes_on_with_what_the_others_have_kept(alone, tmp_path, few_digits, capsys):
    folder = shutil.copytree(alone[0], tmp_path / 'model')
    flags = [f'--data_dir={few_digits}', f'--model_dir={folder}']
    result = python('mnist_replica.py', '--workers=1', '--sync_replicas', '--max_steps=15', *flags)
    assert (result.returncode, result.stderr) == (0, 'going on from step 12 of 15\n')
    mnist_deep.main(['--max_steps=18', *flags])
    assert capsys.readouterr().err == 'going on from step 15 of 18\n'
    assert last_step(folder) == 18
    mnist_predict.main([str(ROOT / 'docs' / 'digit.png'), f'--model_dir={folder}'])
    assert re.search(r'digit.png: \d \(', capsys.readouterr().out)


def local_cluster(workers, few_digits, folder):
    """A running cluster, and all its processes, while it trains."""
    process = start('mnist_replica.py', f'--workers={workers}', '--max_steps=100000',
                    '--batch_size=5', '--data_dir', few_digits, '--model_dir', folder)
    assert process.stdout.readline().startswith('step ')
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 1 + workers
    return process, children


def test_ctrl_c_keeps_the_network_and_leaves_no_process(few_digits, tmp_path):
    process, children = local_cluster(2, few_digits, tmp_path)
    process.send_signal(signal.SIGINT)
    errors = own_lines(process.communicate(timeout=60)[1])
    assert process.returncode == 130
    step = int(re.fullmatch(fr'stopped at step (\d+), kept in {tmp_path}\n', errors)[1])
    assert abs(last_step(tmp_path) - step) <= 1  # the other worker may have been a step further
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_when_one_process_fails_all_end(few_digits, tmp_path):
    process, children = local_cluster(1, few_digits, tmp_path)
    task = {'type': 'worker', 'index': 0}
    next(child for child in children
         if json.loads(child.environ()['TF_CONFIG'])['task'] == task).kill()
    errors = own_lines(process.communicate(timeout=60)[1])
    assert (process.returncode, errors) == (1, 'worker 0 has ended with code -9, so all end\n')
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_no_process_outlives_the_one_that_started_it(few_digits, tmp_path):
    process, children = local_cluster(1, few_digits, tmp_path)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=60)[1]


# Faults

@pytest.mark.parametrize('mode', [[], ['--sync_replicas']])
def test_each_task_may_be_killed_and_started_again(mode, cluster, tmp_path):
    tasks, model = cluster(2, 100000, *mode), tmp_path / 'model'
    server, chief, worker = tasks.start('ps'), tasks.start('worker', 0), tasks.start('worker', 1)
    joined(worker)

    worker.kill()
    if not mode:  # one that is gone for good leaves the others going
        until(checkpoint_after(model, newest(model) + 20), chief)
    worker = tasks.start('worker', 1)
    joined(worker)
    until(checkpoint_after(model, newest(model)), chief)

    server.kill()
    server.communicate()
    before = newest(model)
    server = tasks.start('ps')
    for process in (chief, worker):
        assert own_line(process).startswith('a parameter server was lost; training goes on')
    until(checkpoint_after(model, before), chief)

    chief.kill()
    chief.communicate()
    last = newest(model) + 20
    chief = tasks.start('worker', 0, '--max_steps', last)
    output, errors = chief.communicate(timeout=120)
    errors = own_lines(errors)
    assert chief.returncode == 0 and 'test accuracy' in output, errors
    assert re.fullmatch(fr'going on from step \d+ of {last}\n', errors)
    assert last_step(model) >= last  # the other worker may have been further
    worker.kill()
    assert server.wait(60) == 0  # it waits for the other worker for a while only


# What is wrong is said in one line

GOOD = {'cluster': {'ps': ['127.0.0.1:1'], 'worker': ['127.0.0.1:2', '127.0.0.1:3']},
        'task': {'type': 'worker', 'index': 0}}


def changed(**parts):
    return json.dumps({**GOOD, **parts})


@pytest.mark.parametrize('config, message', [
    ('', 'TF_CONFIG is not set.* or give --workers 2'),
    ('{"cluster"', 'expected JSON as in --help'),
    ('[]', 'expected JSON as in --help'),
    (json.dumps({'cluster': GOOD['cluster']}), r"and a task \(KeyError: 'task'\)"),
    (json.dumps({'task': GOOD['task']}), r"KeyError: 'cluster'"),
    (changed(task={'type': 'worker'}), "KeyError: 'index'"),
    (changed(task={'type': 'worker', 'index': 'one'}), 'TypeError'),
    (changed(task={'type': 'worker', 'index': 2}), "has the task .*2}, expected one of .*counted"),
    (changed(task={'type': 'worker', 'index': -1}), "has the task .*-1}, expected one of"),
    (changed(task={'type': 'ps', 'index': 1}), 'has the task'),
    (changed(task={'type': 'evaluator', 'index': 0}), 'has the task'),
    (changed(task={'type': 'chief', 'index': 0}), 'has the task'),
    (changed(cluster={'ps': ['127.0.0.1:1']}), r"has the jobs \['ps'\], expected \"ps\" and"),
    (changed(cluster={'worker': ['127.0.0.1:1']}), r"has the jobs \['worker'\]"),
    (changed(cluster={'ps': [], 'worker': ['127.0.0.1:1']}), 'has the jobs'),
    (changed(cluster={'ps': ['here'], 'worker': ['127.0.0.1:1']}), '"host:port" addresses'),
    (changed(cluster={'ps': ['here:http'], 'worker': ['127.0.0.1:1']}), '"host:port" addresses')])
def test_a_wrong_tf_config(config, message, monkeypatch):
    monkeypatch.setenv('TF_CONFIG', config)
    with pytest.raises(ValueError) as refused:
        mnist_replica.main(['--model_dir=model'])
    line, = str(refused.value).splitlines()
    assert line.startswith('TF_CONFIG ') and re.search(message, line)


def test_a_chief_is_worker_0(monkeypatch):
    jobs = {'ps': ['a:1'], 'chief': ['b:2'], 'worker': ['c:3', 'd:4']}
    for task, expected in (({'type': 'chief', 'index': 0}, ('worker', 0)),
                           ({'type': 'worker', 'index': 1}, ('worker', 2)),
                           ({'type': 'ps', 'index': 0}, ('ps', 0))):
        monkeypatch.setenv('TF_CONFIG', json.dumps({'cluster': jobs, 'task': task}))
        cluster, *found = mnist_replica.read_tf_config()
        assert tuple(found) == expected
        assert cluster.as_dict() == {'ps': ['a:1'], 'worker': ['b:2', 'c:3', 'd:4']}


@pytest.mark.parametrize('flags, message', [
    (['--workers=0'], 'argument --workers: 0 is not a number above 0'),
    (['--workers=2', '--max_steps=0'], 'argument --max_steps: 0 is not a number above 0'),
    (['--workers=2', '--data_dir=/dev/null/x'], "'/dev/null/x'"),
    ([], '--model_dir: a cluster needs a folder')])
def test_wrong_flags(flags, message):
    with pytest.raises((OSError, ValueError)) as refused:
        mnist_replica.main(flags)
    line, = str(refused.value).splitlines()
    assert message in line


@pytest.mark.parametrize('job', ['ps', 'worker'])
def test_an_address_that_is_taken(job, cluster):
    tasks = cluster(1, 10)
    host, port = tasks.addresses[job][0].split(':')
    with socket.create_server((host, int(port))):
        process = tasks.start(job)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, '')
    line, = own_lines(errors).splitlines()
    assert tasks.addresses[job][0] in line and 'is it taken' in line


def test_a_folder_of_something_else_is_refused_and_left(cluster, tmp_path):
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'letter.txt').write_text('Dear reader')
    chief = cluster(1, 10).start('worker')
    errors = own_lines(chief.communicate(timeout=60)[1])
    assert chief.returncode == 2
    line, = errors.splitlines()
    assert 'it holds letter.txt, and no checkpoint of this network' in line
    assert os.listdir(tmp_path / 'model') == ['letter.txt']


@pytest.mark.parametrize('listens', [False, True])
def test_a_server_that_does_not_answer_is_named_again_and_again(listens, cluster, tmp_path):
    tasks = cluster(2, 10)
    address, = tasks.addresses['ps']
    host, port = address.split(':')
    chief_at = tasks.addresses['worker'][0]
    expected = [fr'waiting for the parameter server at {address} \(.*refused\)\n'] * 2
    if listens:  # something else, or a machine that hangs
        answer = f'waiting for an answer of the parameter server at {address}'
        expected = [f'{answer}\n', f'{answer}, or the chief, worker 0 at {chief_at}\n']
    with socket.create_server((host, int(port))) if listens else contextlib.nullcontext():
        for index in (0, 1):
            config = {'cluster': tasks.addresses, 'task': {'type': 'worker', 'index': index}}
            process = start('-c', 'import mnist_replica\n'
                            'assert mnist_replica.PATIENCE == 30\n'
                            'mnist_replica.PATIENCE = 1\n'
                            'mnist_replica.main()', *tasks.flags,
                            env={**ENVIRONMENT, 'TF_CONFIG': json.dumps(config)})
            tasks.processes.append(process)
            for _ in range(2):
                assert re.fullmatch(expected[index], own_line(process))
            process.send_signal(signal.SIGINT)  # and Ctrl-C ends the waiting at once
            assert process.wait(60) == -signal.SIGINT


def test_a_worker_without_its_chief_says_so_and_waits(cluster):
    tasks = cluster(2, 30)
    server = tasks.start('ps')
    config = {'cluster': tasks.addresses, 'task': {'type': 'worker', 'index': 1}}
    worker = start('-c', 'import mnist_replica\nmnist_replica.PATIENCE = 1\nmnist_replica.main()',
                   *tasks.flags, env={**ENVIRONMENT, 'TF_CONFIG': json.dumps(config)})
    tasks.processes.append(worker)
    until(lambda: f'worker 0 at {tasks.addresses["worker"][0]}' in own_line(worker), worker)
    chief = tasks.start('worker', 0)
    assert 'test accuracy' in chief.communicate(timeout=120)[0]
    assert worker.wait(60) == server.wait(60) == 0


def test_help_tells_the_danger_and_every_flag(capsys):
    with pytest.raises(SystemExit, match='^0$'):
        mnist_replica.main(['--help'])
    output = capsys.readouterr().out
    for text in ('no passwords', 'every network interface', 'TF_CONFIG', '--workers',
                 '--sync_replicas', '--model_dir'):
        assert text in output


def test_stands_on_the_network_and_the_loader_alone():
    source = (ROOT / 'mnist_replica.py').read_text()
    ours = re.findall(r'^import (mnist_\w+|input_data)', source, re.MULTILINE)
    assert ours == ['input_data', 'mnist_deep']
