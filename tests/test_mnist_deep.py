"""Part two of the tutorial: the convolutional network, its checkpoints, TensorBoard, bfloat16."""

import random
import re
import shutil
import signal
import time

import numpy as np
import pytest
from conftest import DATA, ENVIRONMENT, python, start

import input_data
import mnist_deep

tf = mnist_deep.tf


@pytest.fixture(autouse=True)
def graph():
    """A fresh graph for each test."""
    with tf.Graph().as_default() as fresh:
        yield fresh


def files(folder):
    """The contents of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def events(folder):
    """All events of a folder's event files, read by TensorFlow, in order."""
    return [event for path in sorted(folder.glob('events.*'))
            for event in tf.train.summary_iterator(str(path))]


def values(folder):
    """(step, tag, value) of all summaries in a folder."""
    return [(event.step, value.tag, value) for event in events(folder)
            for value in event.summary.value]


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
    assert [line.split(',')[0] for line in lines[:-1]] == [f'step {i}' for i in range(0, 400, 100)]
    for line in lines[:-1]:
        assert re.fullmatch(r'step \d+, training accuracy [01](\.\d+)?', line)
    assert float(re.fullmatch(r'test accuracy (0\.\d+)', lines[-1])[1]) > 0.92


def test_flags_have_the_tutorials_defaults():
    _, flags = mnist_deep.parse_flags([])
    assert (flags.max_steps, flags.batch_size, flags.learning_rate) == (20000, 50, 1e-4)
    assert (flags.model_dir, flags.save_checkpoints_steps, flags.bfloat16) == (None, 1000, False)


@pytest.mark.parametrize('size', [1, 7, 20, 100])
def test_evaluation_goes_through_every_example_once(size):
    numbers = np.arange(20)
    data_set = input_data.DataSet(np.zeros((20, 1, 1, 1), np.uint8), numbers)
    for _ in range(2):
        batches = [labels for _, labels in mnist_deep.in_batches(data_set, size)]
        assert np.concatenate(batches).tolist() == numbers.tolist()


def test_takes_at_most_1100_megabytes_evaluation_included():
    # Measured from a small process: a child's peak begins with what its parent has.
    result = python('-c', 'import resource, subprocess, sys\n'
                    'subprocess.run([sys.executable, "mnist_deep.py", "--max_steps=20"])\n'
                    'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)')
    assert 'test accuracy' in result.stdout
    kilobytes = int(result.stdout.splitlines()[-1])
    assert 200e3 < kilobytes < 1.1e6


# Checkpoints

def test_keeps_the_last_checkpoints_and_the_final_one(trained):
    folder, _ = trained
    assert sorted(name for name in files(folder) if name.endswith('.index')) == [
        'mnist_deep.ckpt-300.index', 'mnist_deep.ckpt-400.index']
    assert tf.train.latest_checkpoint(folder) == str(folder / 'mnist_deep.ckpt-400')


def test_a_checkpoint_restores_by_the_tutorials_recipe(trained):
    folder, output = trained
    x = tf.placeholder(tf.float32, shape=[None, 784])
    y_conv, keep_prob = mnist_deep.deepnn(x)
    test = input_data.read_data_sets(DATA).test
    with tf.Session() as sess:
        tf.train.Saver().restore(sess, tf.train.latest_checkpoint(folder))
        right = sum((y_conv.eval({x: images, keep_prob: 1.0}).argmax(1) == labels).sum()
                    for images, labels in mnist_deep.in_batches(test))
    assert output.endswith('test accuracy %g\n' % (right / 10000))


def test_a_model_folder_changes_nothing_about_the_training(tmp_path, few_digits, capsys):
    printed = []
    for flags in ([], [f'--model_dir={tmp_path}', '--save_checkpoints_steps=2']):
        with tf.Graph().as_default():
            mnist_deep.main(['--max_steps=20', '--seed=1', f'--data_dir={few_digits}', *flags])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ''


def test_a_finished_model_is_only_evaluated_wherever_it_was_moved(trained, tmp_path, capsys):
    trained_in, output = trained
    folder = shutil.copytree(trained_in, tmp_path / 'elsewhere')
    before = files(folder)
    mnist_deep.main(['--max_steps=400', f'--model_dir={folder}'])
    assert capsys.readouterr() == (output.splitlines()[-1] + '\n',
                                   'going on from step 400 of 400\n')
    assert files(folder) == before


def test_ctrl_c_saves_and_the_next_run_does_the_remaining_steps(tmp_path, few_digits):
    folder = tmp_path / 'model'
    flags = ['--data_dir', few_digits, '--model_dir', folder]
    process = start('mnist_deep.py', '--max_steps=100000', *flags)
    assert process.stdout.readline().startswith('step 0,')  # at once, though into a pipe
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    step = int(re.fullmatch(fr'stopped at step (\d+), kept in {folder}\n', errors)[1])
    assert tf.train.latest_checkpoint(folder) == str(folder / f'mnist_deep.ckpt-{step}')
    result = python('mnist_deep.py', '--max_steps', step + 5, *flags)
    assert result.stderr == f'going on from step {step} of {step + 5}\n'
    assert tf.train.latest_checkpoint(folder) == str(folder / f'mnist_deep.ckpt-{step + 5}')


def test_kill_9_costs_at_most_the_steps_since_the_last_checkpoint(tmp_path, few_digits):
    folder = tmp_path / 'model'
    flags = ['--max_steps=200', '--seed=1', '--batch_size=5', '--data_dir', few_digits,
             '--model_dir', folder]
    process = start('mnist_deep.py', *flags, '--save_checkpoints_steps=30')
    for step in (0, 100):
        assert process.stdout.readline().startswith(f'step {step},')
    process.kill()
    process.communicate()
    result = python('mnist_deep.py', *flags)
    resumed = int(re.fullmatch(r'going on from step (\d+) of 200\n', result.stderr)[1])
    assert resumed % 30 == 0 and 90 <= resumed < 200
    assert [line.split(',')[0] for line in result.stdout.splitlines()[:-1]] == (
        ['step 100'] if resumed == 90 else [])
    assert tf.train.latest_checkpoint(folder) == str(folder / 'mnist_deep.ckpt-200')


def test_kill_9_at_any_moment_leaves_a_folder_that_resumes(tmp_path, few_digits):
    folder, reached = tmp_path / 'model', 0
    for number in range(3):
        process = start('mnist_deep.py', '--max_steps=100000', '--data_dir', few_digits,
                        '--model_dir', folder, '--save_checkpoints_steps=1')
        if number:
            line = process.stderr.readline()
            resumed = int(re.fullmatch(r'going on from step (\d+) of 100000\n', line)[1])
            assert resumed >= reached > 0
        while not list(folder.glob(f'*-{reached + 3}.index')):  # a few steps on
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(random.random() / 5)
        process.kill()
        process.communicate()
        reached += 3
    assert len(list(folder.glob('*.index'))) <= 3
    assert len(list(folder.glob('*tempstate*'))) <= 2


def test_resumed_with_a_seed_it_takes_up_the_order_of_the_minibatches(tmp_path, few_digits,
                                                                       monkeypatch):
    drawn = []
    next_batch = input_data.DataSet.next_batch

    def recorded(self, batch_size, *args, **kwargs):
        batch = next_batch(self, batch_size, *args, **kwargs)
        if self.num_examples == 1000:  # the training set
            drawn.append(batch[1].argmax(1).tolist())
        return batch
    monkeypatch.setattr(input_data.DataSet, 'next_batch', recorded)

    for steps in (3, 7):
        with tf.Graph().as_default():
            mnist_deep.main([f'--max_steps={steps}', '--seed=1', f'--data_dir={few_digits}',
                             f'--model_dir={tmp_path}'])
    expected = input_data.read_data_sets(few_digits, one_hot=True, seed=1).train
    batches = [next_batch(expected, 50)[1].argmax(1).tolist() for _ in range(7)]
    assert drawn == batches[:3] + batches  # three steps; then three passed over, and four steps


@pytest.mark.parametrize('precision, every, last', [
    ([], 7, 110), (['--bfloat16'], 1, 40)])
def test_a_killed_run_resumed_is_the_run_that_was_never_killed(precision, every, last, tmp_path,
                                                               few_digits):
    flags = [*precision, '--seed=1', '--max_steps', last, '--save_checkpoints_steps', every,
             '--batch_size=5', '--data_dir', few_digits, '--model_dir']
    whole = python('mnist_deep.py', *flags, tmp_path / 'whole')

    killed_at = random.randint(1, last // every) * every
    process = start('mnist_deep.py', *flags, tmp_path / 'killed')
    while not (tmp_path / 'killed' / f'mnist_deep.ckpt-{killed_at}.index').exists():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(random.random() * every / 50)
    process.kill()
    printed = process.communicate()[0].splitlines()
    resumed = python('mnist_deep.py', *flags, tmp_path / 'killed')

    assert whole.returncode == resumed.returncode == 0
    lines = whole.stdout.splitlines()
    assert printed == lines[:len(printed)]
    again = resumed.stdout.splitlines()
    assert again == lines[-len(again):] and len(printed) + len(again) >= len(lines)
    expected, found = (tf.train.load_checkpoint(str(tmp_path / name)) for name in
                       ('whole', 'killed'))
    names = expected.get_variable_to_shape_map()
    assert len(names) == 8 * 3 + 3  # Adam has two slots for each variable, and two powers
    for name in names:
        assert expected.get_tensor(name).tobytes() == found.get_tensor(name).tobytes(), name


def test_a_run_stopped_twice_and_extended_is_the_one_of_one_go(tmp_path, few_digits, capsys):
    printed = []
    for folder, ends in (('whole', [103]), ('parts', [3, 101, 103])):
        for end in ends:
            with tf.Graph().as_default():
                mnist_deep.main([f'--max_steps={end}', '--seed=2', '--batch_size=5',
                                 f'--data_dir={few_digits}', f'--model_dir={tmp_path / folder}'])
        printed.append([line for line in capsys.readouterr().out.splitlines()
                        if line.startswith('step')])
    assert printed[0] == printed[1]
    expected, found = (tf.train.load_checkpoint(str(tmp_path / name)) for name in
                       ('whole', 'parts'))
    for name in expected.get_variable_to_shape_map():
        assert expected.get_tensor(name).tobytes() == found.get_tensor(name).tobytes(), name


def test_a_folder_with_another_model_is_refused_and_left(tmp_path, few_digits, capsys):
    weights = tf.Variable(tf.zeros([784, 10]))
    with tf.Session() as sess:
        sess.run(weights.initializer)
        tf.train.Saver().save(sess, str(tmp_path / 'model.ckpt'), global_step=5)
    before = files(tmp_path)
    with tf.Graph().as_default(), pytest.raises(SystemExit, match='2'):
        mnist_deep.main([f'--data_dir={few_digits}', f'--model_dir={tmp_path}'])
    output, errors = capsys.readouterr()
    line, = errors.splitlines()
    assert line.endswith(f': error: --model_dir {tmp_path}: its checkpoint is of another model; '
                         'name a new folder') and output == ''
    assert files(tmp_path) == before


@pytest.mark.parametrize('name, content, message', [
    ('saved_model.pb', b'\x08\x01', 'it holds saved_model.pb, and no checkpoint of this network'),
    ('checkpoint', b'no text of a protocol buffer', 'it holds checkpoint, and no checkpoint'),
    ('checkpoint', b'model_checkpoint_path: "gone-5"', 'its checkpoint cannot be read')])
def test_a_folder_with_something_else_is_refused_and_left(name, content, message, tmp_path,
                                                          capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match='2'):
        mnist_deep.main(['--model_dir', str(tmp_path)])
    line, = capsys.readouterr().err.splitlines()
    assert message in line and 'name a new folder' in line
    assert files(tmp_path) == {name: content}


def test_a_model_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(SystemExit, match='2'):
        mnist_deep.main(['--model_dir', str(tmp_path / 'file')])
    line, = capsys.readouterr().err.splitlines()
    assert '--model_dir' in line and 'File exists' in line


# TensorBoard

def test_curves_have_a_point_every_100_steps(trained):
    folder, output = trained
    for tag in ('cross_entropy', 'training_accuracy', 'W_conv1', 'W_conv1_filters/image/0'):
        steps = [step for step, name, _ in values(folder) if name == tag]
        assert steps == [0, 100, 200, 300], tag
    shown = [value.simple_value for _, tag, value in values(folder) if tag == 'training_accuracy']
    printed = [float(number) for number in re.findall('training accuracy (.*)', output)]
    assert shown == pytest.approx(printed)


def test_the_first_layers_filters_are_a_picture_of_4_rows_of_8(trained):
    folder, _ = trained
    picture = [value.image for _, tag, value in values(folder) if 'filters' in tag][-1]
    assert (picture.height, picture.width) == (4 * 6, 8 * 6)


def test_every_mistake_is_an_image_that_says_what_it_was_taken_for(trained):
    folder, output = trained
    mistakes = [(tag, value.image) for _, tag, value in values(folder) if 'mistakes' in tag]
    accuracy = float(re.search('test accuracy (.*)', output)[1])
    assert len(mistakes) == round((1 - accuracy) * 10000)
    test = input_data.read_data_sets(DATA, dtype='uint8', reshape=False).test
    with tf.Session() as sess:
        for tag, image in mistakes[:20]:
            label, guess, number = map(int, re.fullmatch(
                r'mistakes/(\d)_taken_for_(\d)/test_image_(\d+)', tag).groups())
            assert label == test.labels[number] != guess
            pixels = sess.run(tf.image.decode_png(image.encoded_image_string))
            assert (pixels == test.images[number]).all()


def test_the_graph_shows_its_name_scopes(trained):
    folder, _ = trained
    definition = tf.GraphDef()
    definition.ParseFromString(next(event.graph_def for event in events(folder)
                                    if event.HasField('graph_def')))
    scopes = {node.name.split('/')[0] for node in definition.node}
    assert scopes >= {'reshape', 'conv1', 'pool1', 'conv2', 'pool2', 'fc1', 'dropout', 'fc2',
                      'loss', 'adam_optimizer', 'accuracy'}


def test_a_resumed_run_voids_what_was_written_of_later_steps(tmp_path, few_digits):
    for steps in (5, 7):
        with tf.Graph().as_default():
            mnist_deep.main([f'--max_steps={steps}', f'--data_dir={few_digits}',
                             f'--model_dir={tmp_path}'])
    starts = [event.step for event in events(tmp_path)
              if event.session_log.status == tf.SessionLog.START]
    assert starts == [0, 5]


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


def test_trains_in_bfloat16():
    result = python('mnist_deep.py', '--bfloat16', '--max_steps=150', '--seed=1')
    assert result.returncode == 0
    assert float(result.stdout.split()[-1]) > 0.85
    if mnist_deep.computes_in_bfloat16():
        assert result.stderr == ''


def test_trains_in_float32_and_says_so_where_bfloat16_would_be_emulated(few_digits):
    environment = {**ENVIRONMENT, 'ONEDNN_MAX_CPU_ISA': 'AVX512_CORE'}
    flags = ['--max_steps=5', '--seed=1', '--data_dir', few_digits]
    emulated = python('mnist_deep.py', '--bfloat16', *flags, env=environment)
    float32 = python('mnist_deep.py', *flags, env=environment)
    assert emulated.returncode == 0
    assert emulated.stdout == float32.stdout
    line, = emulated.stderr.splitlines()
    assert 'bfloat16' in line and 'training in float32' in line


@pytest.mark.parametrize('limit', ['SSE41', 'avx2', 'AVX2_VNNI_2', 'AVX512_CORE',
                                   'AVX512_CORE_VNNI'])
def test_onednns_limits_without_bfloat16_are_heeded(limit, monkeypatch):
    monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', limit)
    assert not mnist_deep.computes_in_bfloat16()


@pytest.mark.parametrize('limit', ['AVX512_CORE_BF16', 'AVX512_CORE_FP16', 'AVX512_CORE_AMX',
                                   'AVX10_1_512', 'ALL', 'DEFAULT', ''])
def test_other_limits_of_onednn_change_nothing(limit, monkeypatch):
    unlimited = mnist_deep.computes_in_bfloat16()
    monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', limit)
    assert mnist_deep.computes_in_bfloat16() == unlimited
