"""The loader: TensorFlow 1.x's contract, minibatches, damaged files, downloads."""

import copy
import gzip
import hashlib
import inspect
import io
import os
import pathlib
import pickle
import shutil
import signal
import sys
import threading
import tracemalloc

import numpy as np
import pexpect
import pytest
from conftest import DATA, FIRST_LINES, NAMES, ROOT, python, start, write_data_set, write_idx

import input_data

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES


@pytest.fixture(scope='module')
def mnist():
    return input_data.read_data_sets(DATA, one_hot=True, seed=0)


@pytest.fixture
def copies(tmp_path):
    """A folder with copies of the real files, to damage."""
    for name in NAMES:
        shutil.copy(DATA / name, tmp_path)
    return tmp_path


def numbered(n, **options):
    """A data set whose images, of one pixel, and labels are their numbers."""
    numbers = np.arange(n, dtype=np.uint8)
    return input_data.DataSet(numbers.reshape(n, 1, 1, 1), numbers, dtype='uint8', **options)


# The contract


@pytest.mark.parametrize('name, parameters', [
    ('read_data_sets', ("(train_dir, fake_data=False, one_hot=False, dtype=<class 'numpy.float32'>,"
                        " reshape=True, validation_size=5000, seed=None, source_url="
                        "'https://storage.googleapis.com/cvdf-datasets/mnist/')")),
    ('load_mnist', "(train_dir='MNIST-data')"),
    ('DataSet', ("(images, labels, fake_data=False, one_hot=False, dtype=<class 'numpy.float32'>, "
                 'reshape=True, seed=None)')),
    ('extract_images', '(f)'),
    ('extract_labels', '(f, one_hot=False, num_classes=10)'),
    ('dense_to_one_hot', '(labels_dense, num_classes)'),
    ('maybe_download', '(filename, work_directory, source_url)')])
def test_has_the_names_of_1x_with_their_parameters(name, parameters):
    assert str(inspect.signature(getattr(input_data, name))) == parameters


def test_every_public_name_tells_what_it_is():
    public = [value for name, value in vars(input_data).items()
              if inspect.getmodule(value) is input_data and not name.startswith('_')]
    assert len(public) == 8
    for value in public:
        assert inspect.getdoc(value)


def test_reads_mnist_in_three_parts(mnist):
    assert mnist._fields == ('train', 'validation', 'test')
    assert [part.num_examples for part in mnist] == [55000, 5000, 10000]
    assert [part.labels.shape for part in mnist] == [(55000, 10), (5000, 10), (10000, 10)]
    assert {part.labels.dtype for part in mnist} == {np.dtype(np.float64)}
    assert [part.epochs_completed for part in mnist] == [0, 0, 0]
    assert mnist.test.labels[:5].argmax(1).tolist() == [7, 2, 1, 0, 4]
    assert mnist.test.images.shape == (10000, 784)


def test_images_are_the_bytes_times_1_over_255_to_the_bit(mnist):
    with gzip.open(DATA / TEST_IMAGES) as f:
        pixels = np.frombuffer(f.read()[16:], np.uint8).reshape(10000, 784)
    expected = pixels.astype(np.float32) * np.float32(1 / 255)
    fresh = input_data.read_data_sets(DATA).test
    batch = fresh.next_batch(10000, shuffle=False)[0]
    assert batch.dtype == fresh.images.dtype == np.float32
    assert batch.tobytes() == fresh.images.tobytes() == expected.tobytes()
    assert fresh.images.min() == 0 and fresh.images.max() == 1


@pytest.mark.parametrize('name', ['float32', 'uint8'])
def test_takes_tensorflows_and_numpys_dtypes_and_their_names(name, tmp_path):
    import tensorflow as tf
    write_data_set(tmp_path)
    others = ['float', float] if name == 'float32' else []
    for dtype in (name, getattr(np, name), np.dtype(name), getattr(tf, name), *others):
        part = input_data.read_data_sets(tmp_path, dtype=dtype, validation_size=5).train
        assert part.images.dtype == part.next_batch(3)[0].dtype == name


@pytest.mark.parametrize('size', [0, 60000])
def test_validation_can_be_nothing_or_everything(size):
    mnist = input_data.read_data_sets(DATA, validation_size=size)
    assert mnist.validation.num_examples == size
    assert mnist.train.num_examples == 60000 - size
    empty = mnist.train if size else mnist.validation
    for _ in range(2):
        assert empty.next_batch(10)[0].shape == (0, 784)


def test_fake_data_is_ones_of_class_0_without_files(tmp_path):
    fake = input_data.read_data_sets(tmp_path / 'none', fake_data=True, one_hot=True)
    images, labels = fake.train.next_batch(3, True)
    assert np.array_equal(images, np.ones((3, 784)))
    assert np.array_equal(labels, [[1] + [0] * 9] * 3)
    assert fake.test.num_examples == 10000
    labels = input_data.read_data_sets(tmp_path / 'none', fake_data=True).test.next_batch(2)[1]
    assert np.array_equal(labels, [0, 0])
    assert not list(tmp_path.iterdir())


def test_what_is_written_into_images_and_labels_shows_in_later_batches():
    for dtype in ('float32', 'uint8'):
        part = input_data.read_data_sets(DATA, dtype=dtype).validation
        part.next_batch(50)
        part.images[:] = 7
        part.labels[:] = 3
        images, labels = part.next_batch(50)
        assert (images == 7).all() and (labels == 3).all()


def test_a_batch_is_the_callers_own():
    part = numbered(10)
    part.next_batch(10)[0][:] = 99
    assert part.images.max() == 9


def test_a_data_set_does_not_see_later_changes_of_its_callers_bytes():
    pixels = np.full((4, 2, 2, 1), 255, np.uint8)
    part = input_data.DataSet(pixels, np.zeros(4))
    pixels[:] = 0
    assert (part.next_batch(4)[0] == 1).all()


def test_a_data_set_of_other_numbers_is_scaled_as_in_1x():
    part = input_data.DataSet(np.full((4, 2, 2, 1), 51.0), np.zeros(4))
    assert part.images.dtype == np.float32
    assert (part.next_batch(4)[0] == np.float32(51) * np.float32(1 / 255)).all()


@pytest.mark.parametrize('images, labels, message', [
    (np.zeros((3, 2, 2, 1)), np.zeros(4),
     r'images \[3, 2, 2, 1\] and labels \[4\], expected as many labels as images'),
    (np.zeros((3, 4)), np.zeros(3), r'images \[3, 4\] .* \[n, rows, columns, 1\]'),
    (np.zeros((3, 2, 2, 3)), np.zeros(3), r'images \[3, 2, 2, 3\]')])
def test_a_data_set_refuses_arrays_that_do_not_fit(images, labels, message):
    with pytest.raises(ValueError, match=message):
        input_data.DataSet(images, labels)


def test_extracts_labels_of_more_classes_and_refuses_another_kind():
    with open(DATA / TEST_LABELS, 'rb') as f:
        assert input_data.extract_labels(f, one_hot=True, num_classes=12).shape == (10000, 12)
    with open(DATA / TEST_LABELS, 'rb') as f, pytest.raises(ValueError, match='expected magic'):
        input_data.extract_images(f)


def test_extracts_from_a_file_object_of_any_kind(mnist, tmp_path):
    import tensorflow as tf

    def raw(path):
        return open(path, 'rb', buffering=0)

    def buffered_gzip(path):
        return io.BufferedReader(gzip.open(path))

    def in_memory(path):
        return io.BytesIO(path.read_bytes())

    def tensorflows(path):
        return tf.io.gfile.GFile(str(path), 'rb')

    for opened in (gzip.open, buffered_gzip, raw, in_memory, tensorflows):
        with opened(DATA / TEST_IMAGES) as f:
            images = input_data.extract_images(f)
            assert images.shape == (10000, 28, 28, 1) and images.dtype == np.uint8
        with opened(DATA / TEST_LABELS) as f:
            assert np.array_equal(input_data.extract_labels(f, one_hot=True), mnist.test.labels)
            f.read()  # still open, as in 1.x


def test_dense_to_one_hot_has_a_1_at_the_class():
    assert input_data.dense_to_one_hot(np.array([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert input_data.dense_to_one_hot(np.array([], np.uint8), 3).shape == (0, 3)
    with pytest.raises(ValueError, match='labels from 1 to 3, where .* take 0 to 2'):
        input_data.dense_to_one_hot(np.array([1, 3]), 3)


@pytest.mark.parametrize('suffix', ['.gz', ''])
@pytest.mark.parametrize('dotted', [False, True])  # as 7-Zip names what it unpacks
def test_reads_any_data_set_of_these_names_gzipped_or_unpacked(tmp_path, suffix, dotted):
    write_data_set(tmp_path, suffix=suffix)
    for path in list(tmp_path.iterdir()) if dotted else ():
        path.rename(tmp_path / path.name.replace('-idx', '.idx'))
        (tmp_path / path.name.removesuffix('.gz')).mkdir()  # as in the copy on Kaggle
    parts = input_data.read_data_sets(tmp_path, one_hot=True, validation_size=7, reshape=False)
    assert [part.num_examples for part in parts] == [53, 7, 20]
    assert parts.train.next_batch(2)[0].shape == (2, 9, 7, 1)
    write_data_set(tmp_path, train=99)  # a gzipped file comes first
    assert input_data.read_data_sets(tmp_path, validation_size=0).train.num_examples == 99


def test_the_home_folder_and_the_working_folder_have_short_names(tmp_path, monkeypatch):
    write_data_set(tmp_path / 'digits')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path / 'digits')
    for folder in ('~/digits', pathlib.Path('~/digits'), ''):
        assert input_data.read_data_sets(folder, validation_size=7).train.num_examples == 53
        path = input_data.maybe_download(TEST_LABELS, folder, 'http://127.0.0.1:9/')
        assert os.path.samefile(path, tmp_path / 'digits' / TEST_LABELS)
    monkeypatch.setattr(input_data, 'read_data_sets', lambda folder, read=input_data.read_data_sets:
                        read(folder, validation_size=7))
    assert input_data.load_mnist('~/digits').train.num_examples == 53
    assert not (tmp_path / 'digits' / '~').exists()


def test_an_unpacked_file_under_the_gzipped_name_is_read_too(copies):
    (copies / TEST_IMAGES).write_bytes(gzip.decompress((copies / TEST_IMAGES).read_bytes()))
    assert input_data.read_data_sets(copies).test.num_examples == 10000


def test_more_than_ten_classes_are_read_as_numbers_only(tmp_path):
    write_data_set(tmp_path, classes=26)
    assert input_data.read_data_sets(tmp_path, validation_size=0).train.labels.max() == 25
    with pytest.raises(ValueError, match='labels from 0 to 25, where .* 10 classes take 0 to 9'):
        input_data.read_data_sets(tmp_path, validation_size=0, one_hot=True)


def test_copied_alone_it_runs_a_1x_script_without_tensorflow(tmp_path):
    shutil.copy(ROOT / 'input_data.py', tmp_path)
    (tmp_path / 'script.py').write_text(
        'import sys\n'
        'before = set(sys.modules)\n'
        'import input_data\n'
        f'mnist = input_data.read_data_sets({str(DATA)!r}, one_hot=True)\n'
        'xs, ys = mnist.train.next_batch(100)\n'
        'print(xs.shape, ys.shape)\n'
        'imported = {name.split(".")[0] for name in set(sys.modules) - before}\n'
        'print(imported - sys.stdlib_module_names - {"input_data"})\n')
    result = python(tmp_path / 'script.py', cwd=tmp_path)
    shapes, imported = result.stdout.splitlines()
    assert shapes == '(100, 784) (100, 10)'
    assert 'numpy' in imported and 'tensorflow' not in imported
    assert not result.stderr


# Minibatches

# SHA-256 of the images and labels of that many batches, in a row, from TensorFlow 1.15.5's loader
# (tensorflow.examples.tutorials.mnist.input_data, NumPy 1.18, Python 3.7) on the same four files.
@pytest.mark.parametrize('part, seed, batch_size, batches, options, sha256', [
    ('train', 0, 50, 2500, {},
     '015b4e45c7da8a3a3a7266de514adba8fefc37e0e3aa40ed88483e7cdc349d67'),
    ('train', 42, 128, 1000, {},
     '5ddefcd16d89fce766d108d6936e9711e3b8ebf01d94f1049c7c729d1f18db55'),
    ('validation', 7, 333, 60, {},
     '2676c0ec72df2259162561cef78633322f94cbd80edea1204658204f1127c305'),
    ('test', 2**31 + 5, 50, 450, {},
     'b5836acd8896adfe83cb616c77d8e102b0376749a9b6945e930c89c7f5d1350c'),
    ('validation', 1, 1999, 9, {'dtype': 'uint8', 'reshape': False},
     '68a67492f0bef5a670e1549ad8f62c6bb46df276f57a0e80defc34b7fbba716a'),
    ('validation', 3, 5000, 5, {},
     '5dbb275a0ae6c82542992334e7d7f90e3158b8daf1b0f7a19c16954f5dc813df')])
def test_a_seed_gives_the_batches_of_tensorflow_1_15(part, seed, batch_size, batches, options,
                                                     sha256):
    data_set = getattr(input_data.read_data_sets(DATA, one_hot=True, seed=seed, **options), part)
    digest = hashlib.sha256()
    for _ in range(batches):
        for array in data_set.next_batch(batch_size):
            digest.update(array)
    assert digest.hexdigest() == sha256


def test_shuffle_false_keeps_the_order_where_tensorflow_1_15_did():
    data_set = input_data.read_data_sets(DATA, seed=5).test
    digest = hashlib.sha256()
    for i in range(40):
        for array in data_set.next_batch(700, shuffle=i % 3 == 0):
            digest.update(array)
    assert (digest.hexdigest()
            == '37b77a7443628f00f1b6c78f5e3dd6e2e305220c8e48705915f5cb3c4c838ad1')


class Of1x:
    """TensorFlow 1.15's data set, written down plainly, with a generator for the global one."""

    def __init__(self, numbers, random):
        self.numbers, self.random = numbers, random
        self._num_examples = len(numbers)
        self._epochs_completed = self._index_in_epoch = 0

    def shuffle(self):
        order = np.arange(self._num_examples)
        self.random.shuffle(order)
        self.numbers = self.numbers[order]

    def next_batch(self, size, shuffle=True):
        start = self._index_in_epoch
        if start == 0 and self._epochs_completed == 0 and shuffle:
            self.shuffle()
        if start + size <= self._num_examples:
            self._index_in_epoch = start + size
            return self.numbers[start:start + size].tolist()
        self._epochs_completed += 1
        rest = self.numbers[start:self._num_examples].tolist()
        if shuffle:
            self.shuffle()
        self._index_in_epoch = size - (self._num_examples - start)
        return rest + self.numbers[:self._index_in_epoch].tolist()


# Batches from the three parts of a data set by turns, across the ends of epochs.
TURNS = [(part, size, shuffle) for _ in range(3) for part, size, shuffle in [
    (1, 0, True), (0, 50, True), (2, 7, True), (0, 50, True), (1, 5, False), (1, 7, True),
    (0, 0, True), (2, 20, True), (2, 11, False), (0, 99, True), (1, 9, True)]]


def agrees_with_1x(parts, random):
    """Whether three data sets of numbers give the batches that 1.15's give with a generator."""
    theirs = [Of1x(part.labels.copy(), random) for part in parts]
    return all(parts[part].next_batch(size, shuffle=shuffle)[1].tolist()
               == theirs[part].next_batch(size, shuffle) for part, size, shuffle in TURNS)


def three_parts(**options):
    return [numbered(n, **options) for n in (100, 9, 20)]


def test_without_a_seed_numpys_global_generator_decides_when_a_batch_is_drawn():
    parts = three_parts()
    np.random.seed(42)
    assert agrees_with_1x(parts, np.random.RandomState(42))
    state = np.random.get_state()[1].tolist()
    three_parts()
    assert np.random.get_state()[1].tolist() == state  # making them does not reseed it


def test_mnists_batches_repeat_after_seeding_numpy_as_in_1_15():
    part = input_data.read_data_sets(DATA, one_hot=True).validation
    np.random.seed(7)
    digest = hashlib.sha256()
    for _ in range(60):
        for array in part.next_batch(333):
            digest.update(array)
    assert (digest.hexdigest()
            == '2676c0ec72df2259162561cef78633322f94cbd80edea1204658204f1127c305')


def test_without_any_seed_each_run_has_another_order():
    program = ('import input_data\n'
               'print(input_data.read_data_sets("MNIST_data").test.next_batch(50)[1])')
    first, second = (python('-c', program).stdout for _ in range(2))
    assert len(first) > 100 and first != second


@pytest.mark.parametrize('seed', [777, 0, -1, 2**31 + 5])
def test_tensorflows_seed_decides_the_order_for_all_three_parts_as_in_1_15(seed):
    import tensorflow as tf
    np.random.seed(1)
    state = np.random.get_state()[1].tolist()
    with tf.Graph().as_default():
        tf.compat.v1.set_random_seed(seed)
        for _ in range(2):
            assert agrees_with_1x(three_parts(), np.random.RandomState(seed % (2**31 - 1)))
    assert np.random.get_state()[1].tolist() == state


def test_a_seed_of_its_own_comes_before_tensorflows():
    import tensorflow as tf
    with tf.Graph().as_default():
        tf.compat.v1.set_random_seed(777)
        part = numbered(100, seed=3)
    assert part.next_batch(100)[1].tolist() == numbered(100, seed=3).next_batch(100)[1].tolist()


@pytest.mark.parametrize('graph_seed, seed, batch', [  # what TensorFlow 1.15.5's own loader draws
    (0, 0, [57, 8, 61, 93, 70]), (2**31 - 1, 0, [57, 8, 61, 93, 70]),
    (0, 2**31 - 1, [57, 8, 61, 93, 70]), (5, 0, [26, 86, 2, 55, 75]),
    (0, None, [26, 86, 2, 55, 75])])
def test_two_seeds_of_0_are_another_one_as_in_1_15(graph_seed, seed, batch):
    import tensorflow as tf
    with tf.Graph().as_default():
        tf.compat.v1.set_random_seed(graph_seed)
        assert numbered(100, seed=seed).next_batch(5)[1].tolist() == batch


def test_mnists_batches_follow_tensorflows_seed_in_a_real_program():
    result = python('-c', FIRST_LINES + """if True:
        import hashlib
        for seed in (7, 8):
            tf.set_random_seed(seed)
            part = input_data.read_data_sets('MNIST_data', one_hot=True).validation
            digest = hashlib.sha256()
            for _ in range(60):
                for array in part.next_batch(333):
                    digest.update(array)
            print(digest.hexdigest())""")
    first, second = result.stdout.split()
    assert first == '2676c0ec72df2259162561cef78633322f94cbd80edea1204658204f1127c305' != second


def test_loading_does_not_change_the_seeds_of_tensorflows_operations():
    import tensorflow as tf

    def seeds(loads):
        with tf.Graph().as_default():
            tf.compat.v1.set_random_seed(777)
            if loads:
                three_parts()
            drawn = tf.random.normal([2]).op
            return [(op.get_attr('seed'), op.get_attr('seed2'))
                    for op in drawn.graph.get_operations() if op.type == 'RandomStandardNormal']

    assert seeds(True) == seeds(False) != []


def test_with_a_seed_numpys_global_random_state_is_neither_used_nor_touched():
    def draw():
        part, other = (numbered(100, seed=3) for _ in range(2))  # which do not disturb each other
        return [(part.next_batch(30)[1].tolist(), other.next_batch(17))[0] for _ in range(9)]

    np.random.seed(1)
    state = np.random.get_state()[1].tolist()
    first = draw()
    assert np.random.get_state()[1].tolist() == state
    np.random.seed(2)
    assert draw() == first


@pytest.mark.parametrize('n', [1, 2, 7, 50, 100])
@pytest.mark.parametrize('batch_size', [1, 2, 3, 7, 49, 50, 51, 99, 100, 101, 350])
def test_batches_of_any_size_join_to_epochs_that_are_permutations(n, batch_size):
    part = numbered(n, seed=n)
    drawn, orders = [], set()
    while len(drawn) < 5 * n + batch_size:
        images, labels = part.next_batch(batch_size)
        assert images.ravel().tolist() == labels.tolist()
        assert len(labels) == batch_size
        drawn += labels.tolist()
        # An epoch counts as completed when the batch after it begins.
        assert part.epochs_completed == (len(drawn) - 1) // n
    for first in range(0, 5 * n, n):
        assert sorted(drawn[first:first + n]) == list(range(n))
        orders.add(tuple(drawn[first:first + n]))
    assert len(orders) == 5 or n < 50


def test_a_batch_of_no_examples_is_empty_arrays():
    mnist = input_data.read_data_sets(DATA, one_hot=True, validation_size=0)
    fake = input_data.read_data_sets('none', one_hot=True, fake_data=True)
    for part in (mnist.train, mnist.validation, fake.train):
        images, labels = part.next_batch(0)
        assert images.shape == (0, 784) and labels.shape == (0, 10)
        assert images.dtype == np.float32 and part.epochs_completed == 0


def test_threads_draw_each_example_once_an_epoch():
    part, drawn = numbered(20, seed=0), [[] for _ in range(4)]

    def draw(mine):
        for _ in range(2000):
            mine += part.next_batch(4)[1].tolist()

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=draw, args=(mine,)) for mine in drawn]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(usual)
    assert np.bincount(np.concatenate(drawn)).tolist() == [4 * 2000 * 4 // 20] * 20


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='a system without forks')
@pytest.mark.filterwarnings('ignore:.*is multi-threaded:DeprecationWarning')  # as it has to be
def test_a_child_that_is_forked_while_threads_draw_can_draw_too():
    part, over = numbered(1000, seed=1), threading.Event()

    def draw():
        while not over.is_set():
            part.next_batch(997)
    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            child = os.fork()
            if not child:
                signal.alarm(20)  # which ends one that waits for ever
                part.next_batch(5)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        over.set()
        for thread in threads:
            thread.join(60)



def test_a_data_set_can_be_copied_and_pickled():
    import tensorflow as tf
    with tf.Graph().as_default():
        tf.compat.v1.set_random_seed(777)
        parts = [numbered(100), numbered(100, seed=3)]
    for part in [*parts, numbered(100)]:
        part.next_batch(30)
        others = copy.deepcopy(part), pickle.loads(pickle.dumps(part))
        rest = part.next_batch(70)[1].tolist()
        assert [other.next_batch(70)[1].tolist() for other in others] == [rest, rest]


# The names with an underscore, which 1.x programs read and write

def test_the_names_with_an_underscore_are_the_public_ones(mnist):
    part = input_data.read_data_sets(DATA, one_hot=True).validation
    part.next_batch(50)
    assert (part._num_examples, part._epochs_completed, part._index_in_epoch) == (5000, 0, 50)
    assert part._images is part.images and part._labels is part.labels
    assert part._images.dtype == np.float32 and part._images.max() == 1
    assert np.array_equal(part._images, mnist.validation.images)
    part.next_batch(4950)
    assert (part._epochs_completed, part._index_in_epoch) == (0, 5000)
    part.next_batch(50)
    assert (part._epochs_completed, part._index_in_epoch) == (1, 50)
    part._num_examples, part._epochs_completed = 40, 7
    assert (part.num_examples, part.epochs_completed) == (40, 7)


@pytest.mark.parametrize('name', ['images', 'labels', 'num_examples', 'epochs_completed'])
def test_the_public_names_cannot_be_set_as_in_1x(name):
    with pytest.raises(AttributeError):
        setattr(numbered(5), name, 0)


@pytest.mark.parametrize('epochs', [0, 3])
def test_rewinding_goes_on_as_in_1_15(epochs):
    ours, theirs = numbered(50, seed=3), Of1x(np.arange(50), np.random.RandomState(3))
    counts = []
    for part, draw in ((ours, lambda: ours.next_batch(5)[1].tolist()),
                       (theirs, lambda: theirs.next_batch(5))):
        drawn = []
        for _ in range(3):
            part._epochs_completed, part._index_in_epoch = epochs, 0
            while part._epochs_completed == epochs and len(drawn) < 99:
                drawn.append(draw())
        counts.append(drawn)
    assert counts[0] == counts[1] and len(counts[0]) == 33


def test_what_is_assigned_to_the_images_is_taken_as_it_is():
    part = input_data.read_data_sets(DATA, seed=0).validation
    other = input_data.read_data_sets(DATA).validation.images * 2 - 1
    part._images = other
    assert part.images is part._images is other
    assert part.next_batch(50)[0].min() == -1
    part._images = np.full((5000, 3), 200, np.uint8)
    images = part.next_batch(50)[0]
    assert images.dtype == np.uint8 and (images == 200).all()


def test_batches_go_on_in_their_order_from_images_of_the_same_number():
    part, other = numbered(50, seed=3), numbered(50, seed=3)
    part.next_batch(20)
    other.next_batch(20)
    part._images = part._images + 100
    images, labels = part.next_batch(70)
    assert images.ravel().tolist() == (labels + 100).tolist()
    assert labels.tolist() == other.next_batch(70)[1].tolist()


def test_a_data_set_can_be_cut_down_to_some_of_its_examples():
    part = numbered(100, seed=3)
    part.next_batch(30)
    odd = part._labels % 2 == 1
    part._images, part._labels, part._num_examples = part._images[odd], part._labels[odd], odd.sum()
    part._index_in_epoch = part._epochs_completed = 0
    images, labels = part.next_batch(100)
    assert sorted(labels.tolist()) == sorted([*range(1, 100, 2)] * 2)
    assert images.ravel().tolist() == labels.tolist() and part.epochs_completed == 1


def test_fewer_examples_are_the_first_ones_as_in_1_15():
    ours, theirs = numbered(50, seed=3), Of1x(np.arange(50), np.random.RandomState(3))
    ours._num_examples = theirs._num_examples = 20
    for size in (5, 10, 15, 20, 3):
        assert ours.next_batch(size)[1].tolist() == theirs.next_batch(size)
    ours._num_examples = 0
    assert ours.next_batch(1)[1].tolist() == []


@pytest.mark.parametrize('n', [5, 0])
def test_numbers_below_0_rewind_and_an_empty_data_set_has_empty_batches_as_in_1_15(n):
    ours, theirs = numbered(n, seed=3), Of1x(np.arange(n), np.random.RandomState(3))
    for size in (3, -2, 1, -1, 4, -1, 5, 0, -3, 2):
        assert ours.next_batch(size)[1].tolist() == theirs.next_batch(size)
        assert (ours._index_in_epoch, ours._epochs_completed) == (
            theirs._index_in_epoch, theirs._epochs_completed)


def test_a_subclass_that_never_calls_init_has_batches_as_in_1_15():
    class Mine(input_data.DataSet):
        def __init__(self, images, labels):
            self._images, self._labels = images, labels
            self._num_examples, self._epochs_completed, self._index_in_epoch = len(images), 0, 0

    numbers = np.arange(7)
    ours = Mine(numbers[:, np.newaxis] / 10, numbers)
    theirs = Of1x(numbers, np.random.RandomState(5))
    np.random.seed(5)
    for size in (3, 3, 3, 2):
        images, labels = ours.next_batch(size)
        assert labels.tolist() == theirs.next_batch(size)
        assert images.ravel().tolist() == (labels / 10).tolist()


# Arguments

def test_a_batch_size_is_anything_that_is_a_whole_number():
    import tensorflow as tf
    for size in (3, np.int64(3), tf.compat.v1.Dimension(3)):
        assert len(numbered(5).next_batch(size)[1]) == 3
    for size in (2.5, '50', None):
        part = numbered(5, seed=0)
        with pytest.raises(TypeError):
            part.next_batch(size)
        assert part.next_batch(5)[1].tolist() == numbered(5, seed=0).next_batch(5)[1].tolist()


@pytest.mark.parametrize('arguments, error, message', [
    ({'dtype': 'float64'}, TypeError, "dtype is 'float64', expected float32 or uint8"),
    ({'dtype': np.float64}, TypeError, "dtype is <class 'numpy.float64'>"),
    ({'dtype': np.dtype(float)}, TypeError, "dtype is dtype..float64"),
    ({'dtype': None}, TypeError, 'dtype is None'),
    ({'dtype': 'number'}, TypeError, 'number'),
    ({'seed': 'one'}, TypeError, 'str'), ({'seed': 1.5}, TypeError, 'float')])
def test_a_bad_argument_is_refused_before_any_work(arguments, error, message, tmp_path):
    for fake_data in (False, True):
        with pytest.raises(error, match=message):
            input_data.read_data_sets(tmp_path / 'new', fake_data=fake_data, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('size', [-1, 60001])
def test_a_validation_size_out_of_range_is_refused(size):
    with pytest.raises(ValueError, match=f'validation_size is {size}, expected 0 to 60000'):
        input_data.read_data_sets(DATA, validation_size=size)


def test_a_folder_that_cannot_be_made_is_refused_before_any_download(tmp_path, mirrors):
    (tmp_path / 'file').write_text('mine')
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'folder'):
        with pytest.raises(OSError, match=f'{TRAIN_IMAGES} is missing, and the folder '
                                          f'{folder} cannot be written to .*: name another one'):
            input_data.read_data_sets(folder)
    assert (tmp_path / 'file').read_text() == 'mine'
    assert not mirrors.requests


@pytest.mark.parametrize('url', ['gs://bucket/mnist', 'http://127.0.0.1:9/mnist', 's3://bucket'])
def test_a_url_as_the_folder_is_refused_and_not_made(url, tmp_path, monkeypatch, mirrors):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f'{url} is a URL, expected a folder .* source_url'):
        input_data.read_data_sets(url)
    with pytest.raises(ValueError, match=f'{url} is a URL'):
        input_data.maybe_download(TEST_LABELS, url, mirrors.url + TEST_LABELS)
    assert not list(tmp_path.iterdir()) and not mirrors.requests


# Damaged files

DAMAGES = {
    'cut off': lambda body: body[:1015808],
    'without its last byte': lambda body: body[:-1],
    'with a byte after it': lambda body: body + b'!',
    'with a bit flipped': lambda body: flipped(body, len(body) // 2),
    'with a wrong checksum': lambda body: flipped(body, len(body) - 8),
    'an HTML page': lambda body: b'<!DOCTYPE html><html><title>403 Forbidden</title></html>',
    'nothing': lambda body: b'',
    'a gzip file of nothing': lambda body: gzip.compress(b''),
    'another kind': lambda body: repacked(b'\0\0\x08\x02' + gzip.decompress(body)[4:]),
    'one pixel short': lambda body: repacked(gzip.decompress(body)[:-1]),
    'one pixel over': lambda body: repacked(gzip.decompress(body) + b'\0')}
SOME_DAMAGES = ['cut off', 'nothing', 'one pixel over']


def flipped(body, at):
    return body[:at] + bytes([body[at] ^ 4]) + body[at + 1:]


def repacked(body):
    return gzip.compress(body, 1)


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_file_is_set_aside_and_fetched_anew(damage, copies, mirrors, capsys):
    whole = (copies / TEST_IMAGES).read_bytes()
    damaged = DAMAGES[damage](whole)
    (copies / TEST_IMAGES).write_bytes(damaged)
    assert input_data.read_data_sets(copies).test.num_examples == 10000
    assert mirrors.requests == [TEST_IMAGES]
    assert (copies / TEST_IMAGES).read_bytes() == whole
    aside, = copies.glob('*.damaged-*')
    assert aside.read_bytes() == damaged
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f'{copies / TEST_IMAGES} is damaged: ') and str(aside) in line


@pytest.mark.parametrize('damage', SOME_DAMAGES)
def test_a_damaged_file_that_cannot_be_fetched_is_named_and_left(damage, copies, mirrors):
    damaged = DAMAGES[damage]((copies / TEST_IMAGES).read_bytes())
    (copies / TEST_IMAGES).write_bytes(damaged)
    mirrors.faults[TEST_IMAGES] = [404] * 3
    with pytest.raises(OSError) as caught:
        input_data.read_data_sets(copies)
    for part in (f'{TEST_IMAGES} is damaged: ', '404', 'put the file there by hand'):
        assert part in str(caught.value)
    assert sorted(os.listdir(copies)) == sorted(NAMES)
    assert (copies / TEST_IMAGES).read_bytes() == damaged


@pytest.mark.parametrize('damage', SOME_DAMAGES)
def test_a_damaged_file_of_the_users_own_source_is_refused_and_left(damage, copies, server):
    damaged = DAMAGES[damage]((copies / TEST_IMAGES).read_bytes())
    (copies / TEST_IMAGES).write_bytes(damaged)
    with pytest.raises(ValueError) as caught:
        input_data.read_data_sets(copies, source_url=server.url)
    for part in (f'{TEST_IMAGES} is damaged: ', 'copy a good file there, or delete it',
                 server.url):
        assert part in str(caught.value)
    assert (copies / TEST_IMAGES).read_bytes() == damaged
    assert not server.requests


def test_a_damaged_unpacked_file_is_set_aside_too(copies, mirrors):
    (copies / TEST_LABELS).unlink()
    (copies / 't10k-labels-idx1-ubyte').write_bytes(b'\0\0\x08\x01')
    assert input_data.read_data_sets(copies).test.num_examples == 10000
    assert (copies / TEST_LABELS).exists()
    assert not (copies / 't10k-labels-idx1-ubyte').exists()


def test_a_second_damaged_file_does_not_replace_the_first_set_aside(copies, mirrors):
    for content in (b'one', b'two'):
        (copies / TEST_LABELS).write_bytes(content)
        input_data.read_data_sets(copies)
    assert {path.read_bytes() for path in copies.glob('*.damaged-*')} == {b'one', b'two'}


def test_mnists_files_do_not_fill_the_gaps_of_another_data_set(tmp_path, mirrors):
    write_data_set(tmp_path)
    (tmp_path / TEST_LABELS).unlink()
    with pytest.raises(ValueError, match=f'{TEST_LABELS} is missing; .*train-images-idx3-ubyte '
                                         'is not from MNIST: copy the right file there'):
        input_data.read_data_sets(tmp_path)
    (tmp_path / TEST_LABELS).write_bytes(b'damaged')
    with pytest.raises(ValueError, match=f'{TEST_LABELS} is damaged: .* is not from MNIST'):
        input_data.read_data_sets(tmp_path)
    assert (tmp_path / TEST_LABELS).read_bytes() == b'damaged'
    assert not mirrors.requests


def test_training_and_test_images_of_different_sizes_are_refused(tmp_path):
    write_data_set(tmp_path)
    write_idx(tmp_path / TEST_IMAGES, np.zeros((20, 8, 7), np.uint8))
    with pytest.raises(ValueError, match=r'training images \[60, 9, 7\] and test images '
                                         r'\[20, 8, 7\]: they belong to different data sets'):
        input_data.read_data_sets(tmp_path, validation_size=0)


def test_nothing_is_fetched_beside_a_damaged_file_of_the_users_own_source(copies, server):
    (copies / TRAIN_IMAGES).unlink()
    (copies / TEST_LABELS).write_bytes(b'damaged')
    with pytest.raises(ValueError, match=f'{TEST_LABELS} is damaged'):
        input_data.read_data_sets(copies, source_url=server.url)
    assert not server.requests


@pytest.mark.parametrize('body', [
    gzip.compress(b'\0\0\x08\x03' + b'\0\0\0\1' * 3 + bytes(1 << 26), 1),
    gzip.compress(b'GIF89a' + bytes(1 << 26), 1)], ids=['labels', 'GIF'])
def test_a_file_of_something_else_is_refused_before_it_is_unpacked_whole(body):
    tracemalloc.start()
    with pytest.raises(ValueError, match='but it holds more|it begins with'):
        input_data.extract_images(io.BytesIO(body))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize('pack', [gzip.compress, bytes])
def test_a_header_that_promises_more_than_there_is_costs_no_memory(pack, tmp_path):
    (tmp_path / TRAIN_IMAGES).write_bytes(
        pack(b'\0\0\x08\x03' + b'\x7f\xff\xff\xff' * 3 + bytes(1000)))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r'promises 9,903,520,300,447,984,150,353,281,023 bytes, '
                                         r'\[2147483647, .*\], but it holds 1,000'):
        input_data.read_data_sets(tmp_path, source_url='http://127.0.0.1:9/')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


# Downloads

def test_an_empty_folder_is_filled(tmp_path, mirrors):
    mnist = input_data.read_data_sets(tmp_path / 'new' / 'folder')
    assert mnist.train.num_examples == 55000
    assert sorted(mirrors.requests) == sorted(NAMES)
    for name in NAMES:
        assert (tmp_path / 'new' / 'folder' / name).read_bytes() == (DATA / name).read_bytes()
    assert len(list((tmp_path / 'new' / 'folder').iterdir())) == 4
    input_data.read_data_sets(tmp_path / 'new' / 'folder')
    assert len(mirrors.requests) == 4


def test_what_old_scripts_name_as_the_source_comes_from_the_mirrors(tmp_path, mirrors):
    for number, source_url in enumerate(['http://yann.lecun.com/exdb/mnist/', '', None]):
        input_data.read_data_sets(tmp_path / str(number), source_url=source_url)
    assert len(mirrors.requests) == 12


def test_each_mirror_is_known_as_a_source_of_mnist(copies, server, monkeypatch):
    second = 'https://ossci-datasets.s3.amazonaws.com/mnist/'
    asked = []
    real = input_data._read_url
    monkeypatch.setattr(input_data, '_read_url', lambda url, *rest: asked.append(url) or real(
        server.url + url.rpartition('/')[2], *rest))
    monkeypatch.setattr(input_data, '_PAUSES', (0, 0))
    (copies / TEST_IMAGES).write_bytes(b'damaged')
    server.faults[TEST_IMAGES] = ['wrong']
    assert input_data.read_data_sets(copies, source_url=second).test.num_examples == 10000
    assert (copies / TEST_IMAGES).read_bytes() == (DATA / TEST_IMAGES).read_bytes()
    assert asked == [second + TEST_IMAGES, input_data.DEFAULT_SOURCE_URL + TEST_IMAGES]


def test_a_data_set_comes_from_its_own_source_url(tmp_path, server):
    server.folder = write_data_set(tmp_path / 'origin')
    parts = input_data.read_data_sets(tmp_path / 'copy', validation_size=9, source_url=server.url)
    assert parts.train.num_examples == 51


@pytest.mark.parametrize('faults, requests', [
    ([500], 2), ([503, 429], 3), ([408], 2), (['cut'], 2), (['stall'], 2), (['html'], 2),
    (['wrong'], 2), (['no length'], 1), ([500, 'cut'], 3)])
def test_what_may_pass_is_tried_again(faults, requests, copies, mirrors):
    (copies / TRAIN_IMAGES).unlink()
    mirrors.faults[TRAIN_IMAGES] = faults
    assert input_data.read_data_sets(copies).train.num_examples == 55000
    assert mirrors.requests == [TRAIN_IMAGES] * requests
    assert sorted(os.listdir(copies)) == sorted(NAMES)


@pytest.mark.parametrize('fault, reason', [
    (403, 'HTTP Error 403: Forbidden'), (404, 'HTTP Error 404: Not Found'),
    (500, 'HTTP Error 500: Internal Server Error'), ('cut', 'cut off after 2,271 of 4542 bytes'),
    ('stall', 'timed out'), ('html', "begins with b'<!DOCTYP'"),
    ('wrong', "another file than MNIST's")])
def test_when_all_fails_the_error_names_every_url_and_what_to_do(fault, reason, copies, mirrors,
                                                                 monkeypatch):
    nobody = 'http://127.0.0.1:9/'  # the discard port
    monkeypatch.setattr(input_data, '_MIRRORS', (mirrors.url, nobody))
    (copies / TEST_LABELS).unlink()
    mirrors.faults[TEST_LABELS] = [500, 500, fault]
    with pytest.raises(OSError) as caught:
        input_data.read_data_sets(copies)
    for part in (f'{copies / TEST_LABELS} is missing', f'{mirrors.url}{TEST_LABELS}: ', reason,
                 f'{nobody}{TEST_LABELS}: ', 'refused', 'put the file there by hand'):
        assert part in str(caught.value)
    assert '\n' not in str(caught.value)
    assert sorted(os.listdir(copies)) == sorted(set(NAMES) - {TEST_LABELS})


def test_a_body_without_an_end_is_refused(tmp_path, mirrors, monkeypatch):
    monkeypatch.setattr(input_data, '_MOST', 1 << 20)
    mirrors.faults['README.md'] = ['endless'] * 3
    with pytest.raises(OSError, match='it sends more than 1,048,576 bytes'):
        input_data.maybe_download('README.md', tmp_path, mirrors.url + 'README.md')


def test_pauses_between_tries_grow(copies, mirrors, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(input_data, '_MIRRORS', (mirrors.url,))
    slept = []
    monkeypatch.setattr(input_data.time, 'sleep', slept.append)
    (copies / TEST_LABELS).unlink()
    mirrors.faults[TEST_LABELS] = [500, 500]
    input_data.read_data_sets(copies)
    assert len(slept) == 3 and slept[0] == 0 and 0 < slept[1] < slept[2]


def test_maybe_download_fetches_a_file_once(tmp_path, server):
    for _ in range(2):
        path = input_data.maybe_download(TEST_LABELS, tmp_path / 'new', server.url + TEST_LABELS)
        assert path == str(tmp_path / 'new' / TEST_LABELS)
    assert server.requests == [TEST_LABELS]
    assert (tmp_path / 'new' / TEST_LABELS).read_bytes() == (DATA / TEST_LABELS).read_bytes()


def test_maybe_download_takes_files_of_other_names_as_they_are(tmp_path, server, monkeypatch):
    monkeypatch.setattr(input_data, '_MNIST_URLS', (server.url,))  # which has other files, too
    path = input_data.maybe_download('README.md', tmp_path, server.url + 'README.md')
    assert pathlib.Path(path).read_bytes() == (DATA / 'README.md').read_bytes()


def test_maybe_download_puts_nothing_damaged_in_place(tmp_path, mirrors):
    mirrors.faults[TEST_LABELS] = ['html'] * 3
    with pytest.raises(OSError, match='begins with'):
        input_data.maybe_download(TEST_LABELS, tmp_path, mirrors.url + TEST_LABELS)
    assert not list(tmp_path.iterdir())


# Real processes

def loading(folder, url, prelude=''):
    """The program, as text, that loads a folder from a mirror."""
    return (f'import input_data\n{prelude}\n'
            f'input_data._MIRRORS = ({url!r},)\n'
            f'print(input_data.read_data_sets({str(folder)!r}).train.num_examples)\n')


def test_two_processes_on_one_empty_folder_both_get_good_data(tmp_path, server):
    processes = [start('-c', loading(tmp_path, server.url)) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ['55000\n'] * 2
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES)


def test_a_repair_that_is_killed_at_any_step_loses_nothing(copies, mirrors):
    steps = 0
    while True:
        shutil.rmtree(copies)
        shutil.copytree(DATA, copies)
        (copies / TEST_LABELS).write_bytes(b'damaged')
        # Python tells the hook of what it makes, renames and removes, before it does.
        kill = ('import os, signal, sys\n'
                'events = []\n'
                'def hook(event, arguments):\n'
                '    changes = event != "open" or "x" in str(arguments[1])\n'
                f'    if changes and {str(copies)!r} in str(arguments[:1]):\n'
                '        events.append(event)\n'
                f'        if len(events) > {steps}:\n'
                '            os.kill(os.getpid(), signal.SIGKILL)\n'
                'sys.addaudithook(hook)')
        result = python('-c', loading(copies, mirrors.url, kill))
        kept = [path.read_bytes() for path in copies.glob(f'{TEST_LABELS}*')]
        assert b'damaged' in kept and set(kept) <= {b'damaged', (DATA / TEST_LABELS).read_bytes()}
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL
        steps += 1
        assert input_data.read_data_sets(copies).train.num_examples == 55000
        assert [path.read_bytes() for path in copies.glob('*.damaged-*')] == [b'damaged']
    assert steps > 4


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_download_that_is_stopped_leaves_nothing_and_the_next_is_good(number, tmp_path, server):
    server.faults[TRAIN_IMAGES] = ['stall']
    process = start('-c', loading(tmp_path, server.url))
    assert server.stalled.wait(60)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not list(tmp_path.iterdir())
    assert python('-c', loading(tmp_path, server.url)).stdout == '55000\n'
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES)


def test_a_full_disk_leaves_nothing(tmp_path, server):
    # The kernel refuses to let a file grow beyond a megabyte.
    full = ('import resource\n'
            'resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))')
    result = python('-c', loading(tmp_path, server.url, full))
    assert f'the folder {tmp_path} cannot be written to (File too large)' in result.stderr
    assert not list(tmp_path.iterdir())


def test_progress_shows_on_a_terminal_only(tmp_path, server):
    child = pexpect.spawn(sys.executable, ['-c', loading(tmp_path / 'a', server.url)],
                          cwd=str(ROOT), encoding='utf-8', timeout=60)
    child.expect('train-images-idx3-ubyte.gz 100%')
    child.expect('55000')
    child.wait()
    assert python('-c', loading(tmp_path / 'b', server.url)).stderr == ''


def test_without_standard_error_it_downloads_too(tmp_path, server):
    program = loading(tmp_path, server.url, 'import sys\nsys.stderr = None')  # as pythonw has it
    assert python('-c', program).stdout == '55000\n'
