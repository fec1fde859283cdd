"""Part one of the tutorial: softmax regression."""

import re

import pytest
from conftest import DATA, python

import mnist_softmax


def test_the_tutorials_run_reaches_its_accuracy():
    result = python('mnist_softmax.py', '--seed=0')
    accuracy = float(re.fullmatch(r'test accuracy (0\.\d+)\n', result.stdout)[1])
    assert 0.91 <= accuracy <= 0.93


def test_main_builds_and_trains_when_imported(capsys):
    with mnist_softmax.tf.Graph().as_default() as graph:
        mnist_softmax.main(['--max_steps=50', f'--data_dir={DATA}', '--batch_size=20', '--seed=0'])
        shapes = [variable.shape.as_list() for variable in mnist_softmax.tf.global_variables()]
        inputs = [op.outputs[0].shape.as_list() for op in graph.get_operations()
                  if op.type == 'Placeholder']
    assert shapes == [[784, 10], [10]]
    assert inputs == [[None, 784], [None, 10]]
    assert re.fullmatch(r'test accuracy 0\.[78]\d*\n', capsys.readouterr().out)


def test_a_learning_rate_matters(capsys):
    for rate in ('1e-9', '0.5'):
        with mnist_softmax.tf.Graph().as_default():
            mnist_softmax.main(['--max_steps=20', f'--learning_rate={rate}', '--seed=0'])
    slow, fast = re.findall(r'test accuracy (\S+)', capsys.readouterr().out)
    assert float(slow) + 0.05 < float(fast)


def test_flags_have_the_tutorials_defaults():
    _, flags = mnist_softmax.parse_flags([])
    assert (flags.max_steps, flags.batch_size, flags.learning_rate) == (1000, 100, 0.5)


@pytest.mark.parametrize('count', [1, 7])
def test_progress_yields_every_step(count):
    assert list(mnist_softmax.progress(range(count))) == list(range(count))
