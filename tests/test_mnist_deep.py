"""Part two of the tutorial: the convolutional network, and bfloat16."""

import re

import numpy as np
import pytest
from conftest import DATA

import input_data
import mnist_deep

tf = mnist_deep.tf


@pytest.fixture(autouse=True)
def graph():
    """A fresh graph for each test."""
    with tf.Graph().as_default() as fresh:
        yield fresh


# The network

def test_layers_have_the_tutorials_shapes(graph):
    x = tf.placeholder(tf.float32, shape=[None, 784])
    y_conv, keep_prob = mnist_deep.deepnn(x)
    assert y_conv.shape.as_list() == [None, 10]
    assert keep_prob.op.type == 'Placeholder' and keep_prob.dtype == tf.float32
    shapes = {op.name: op.outputs[0].shape.as_list() for op in graph.get_operations()
              if op.type in ('Relu', 'MaxPool', 'Reshape')}
    assert shapes == {
        'reshape/Reshape': [None, 28, 28, 1], 'conv1/Relu': [None, 28, 28, 32],
        'pool1/MaxPool': [None, 14, 14, 32], 'conv2/Relu': [None, 14, 14, 64],
        'pool2/MaxPool': [None, 7, 7, 64], 'fc1/Reshape': [None, 3136],
        'fc1/Relu': [None, 1024]}


def test_has_3274634_trainable_parameters_in_a_scope_a_layer():
    mnist_deep.deepnn(tf.placeholder(tf.float32, shape=[None, 784]))
    variables = tf.trainable_variables()
    assert sum(variable.shape.num_elements() for variable in variables) == 3274634
    assert [(variable.op.name.split('/')[0], variable.shape.as_list())
            for variable in variables] == [
        ('conv1', [5, 5, 1, 32]), ('conv1', [32]), ('conv2', [5, 5, 32, 64]), ('conv2', [64]),
        ('fc1', [3136, 1024]), ('fc1', [1024]), ('fc2', [1024, 10]), ('fc2', [10])]


def test_weights_are_small_noise_and_biases_a_little_positive():
    weights, biases = mnist_deep.weight_variable([100, 100]), mnist_deep.bias_variable([7])
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        drawn = weights.eval()
        assert 0 < abs(drawn).max() <= 0.2 and abs(drawn.mean()) < 0.01
        assert 0.08 < drawn.std() < 0.1  # truncated at two standard deviations of 0.1
        assert (biases.eval() == np.float32(0.1)).all()


def test_convolution_keeps_the_size_and_pooling_halves_it():
    ones, counted = tf.ones([1, 4, 4, 1]), tf.reshape(tf.range(16.), [1, 4, 4, 1])
    with tf.Session() as sess:
        convolved, pooled = sess.run([mnist_deep.conv2d(ones, tf.ones([5, 5, 1, 1])),
                                      mnist_deep.max_pool_2x2(counted)])
    # Each pixel sums those of its 5x5 neighbourhood that are inside the 4x4 image.
    assert convolved[0, :, :, 0].tolist() == [[9, 12, 12, 9], [12, 16, 16, 12],
                                              [12, 16, 16, 12], [9, 12, 12, 9]]
    assert pooled[0, :, :, 0].tolist() == [[5, 7], [13, 15]]


def test_dropout_works_in_training_alone():
    x = tf.placeholder(tf.float32, shape=[None, 784])
    y_conv, keep_prob = mnist_deep.deepnn(x)
    pixels = input_data.read_data_sets(DATA).test.next_batch(5)[0]
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        drop = [y_conv.eval({x: pixels, keep_prob: 0.5}) for _ in range(2)]
        keep = [y_conv.eval({x: pixels, keep_prob: 1.0}) for _ in range(2)]
    assert (drop[0] != drop[1]).any()
    assert (keep[0] == keep[1]).all()


def test_a_few_hundred_steps_learn_to_read_digits(trained):
    _, output = trained
    lines = output.splitlines()
    assert [line.split(',')[0] for line in lines[:-1]] == [f'step {i}' for i in (0, 100)]
    for line in lines[:-1]:
        assert re.fullmatch(r'step \d+, training accuracy [01](\.\d+)?', line)
    assert float(re.fullmatch(r'test accuracy (0\.\d+)', lines[-1])[1]) > 0.94


def test_flags_have_the_tutorials_defaults():
    flags = mnist_deep.checked(mnist_deep.flag_parser('').parse_args([]))
    assert (flags.max_steps, flags.batch_size, flags.learning_rate) == (20000, 50, 1e-4)
    assert (flags.model_dir, flags.save_checkpoints_steps, flags.bfloat16) == (None, 1000, False)


@pytest.mark.parametrize('size', [1, 7, 20, 100])
def test_evaluation_goes_through_every_example_once(size):
    numbers = np.arange(20)
    data_set = input_data.DataSet(np.zeros((20, 1, 1, 1), np.uint8), numbers)
    for _ in range(2):
        batches = [labels for _, labels in mnist_deep.in_batches(data_set, size)]
        assert np.concatenate(batches).tolist() == numbers.tolist()


def test_takes_at_most_1100_megabytes_evaluation_included(trained):
    folder, output = trained
    assert 'test accuracy' in output
    assert 200e3 < int((folder.parent / 'trained.kilobytes').read_text()) < 1.1e6


# bfloat16

def test_bfloat16_is_what_the_session_computes_in_where_the_cpu_does():
    tf.set_random_seed(1)
    x = tf.placeholder(tf.float32, shape=[None, 784])
    y_conv, keep_prob = mnist_deep.deepnn(x)
    pixels = input_data.read_data_sets(DATA).test.next_batch(50)[0]
    logits = {}
    for bfloat16 in (False, True):
        with tf.Session(config=mnist_deep.session_config(bfloat16)) as sess:
            sess.run(tf.global_variables_initializer())
            logits[bfloat16] = y_conv.eval({x: pixels, keep_prob: 1.0})
    error = abs(logits[True] - logits[False]).max() / abs(logits[False]).max()
    if mnist_deep.computes_in_bfloat16():
        assert 1e-4 < error < 0.05  # 8 bits of mantissa
    else:
        assert error == 0


def test_trains_in_bfloat16(few_digits, capsys):
    mnist_deep.main(['--bfloat16', '--max_steps=100', '--seed=1', '--batch_size=20',
                     '--learning_rate=1e-3', f'--data_dir={few_digits}'])
    output, errors = capsys.readouterr()
    assert float(output.split()[-1]) > 0.85
    if mnist_deep.computes_in_bfloat16():
        assert errors == ''


def test_trains_in_float32_and_says_so_where_bfloat16_would_be_emulated(few_digits, monkeypatch,
                                                                        capsys):
    monkeypatch.setattr(mnist_deep, 'computes_in_bfloat16', lambda: False)
    printed = []
    for flags in (['--bfloat16'], []):
        mnist_deep.main(['--max_steps=5', '--seed=1', f'--data_dir={few_digits}', *flags])
        printed.append(capsys.readouterr())
    assert printed[0].out == printed[1].out != ''
    line, = printed[0].err.splitlines()
    assert 'bfloat16' in line and 'training in float32' in line and printed[1].err == ''
