"""Part one of the tutorial: softmax regression."""

import re

import pytest
from conftest import DATA, ROOT, write_data_set

import mnist_softmax


def test_the_tutorials_run_reaches_its_accuracy(capsys):
    assert 'python mnist_softmax.py --seed 0`' in (ROOT / 'README.md').read_text()
    mnist_softmax.main(['--seed', '0'])
    accuracy = float(re.fullmatch(r'test accuracy (0\.\d+)\n', capsys.readouterr().out)[1])
    assert 0.91 <= accuracy <= 0.93


def test_it_builds_and_trains_when_imported(capsys):
    flags = ['--max_steps=50', f'--data_dir={DATA}', '--batch_size=20', '--seed=0']
    with mnist_softmax.tf.Graph().as_default() as graph:
        mnist_softmax.train(mnist_softmax.parse_flags(flags))
        shapes = [variable.shape.as_list() for variable in mnist_softmax.tf.global_variables()]
        inputs = [op.outputs[0].shape.as_list() for op in graph.get_operations()
                  if op.type == 'Placeholder']
    assert shapes == [[784, 10], [10]]
    assert inputs == [[None, 784], [None, 10]]
    assert re.fullmatch(r'test accuracy 0\.[78]\d*\n', capsys.readouterr().out)


def test_a_learning_rate_matters(capsys):
    for rate in ('1e-9', '0.5'):
        mnist_softmax.main(['--max_steps=20', f'--learning_rate={rate}', '--seed=0'])
    slow, fast = re.findall(r'test accuracy (\S+)', capsys.readouterr().out)
    assert float(slow) + 0.05 < float(fast)


def test_flags_have_the_tutorials_defaults():
    flags = mnist_softmax.parse_flags([])
    assert (flags.max_steps, flags.batch_size, flags.learning_rate) == (1000, 100, 0.5)


def test_a_run_that_fails_leaves_the_shells_own_graph_and_session_the_defaults(tmp_path):
    tf = mnist_softmax.tf
    write_data_set(tmp_path, train=5100)  # of 9x7 pixels
    with tf.Graph().as_default() as graph, tf.Session() as mine:
        with pytest.raises(ValueError, match='Cannot feed value of shape'):
            mnist_softmax.main([f'--data_dir={tmp_path}'])
        assert tf.get_default_session() is mine and tf.get_default_graph() is graph
        assert graph.get_operations() == []
