"""MNIST for TensorFlow 1.x programs: downloads it, checks it, yields minibatches.

A drop-in for `tensorflow.examples.tutorials.mnist.input_data`, which left TensorFlow in 2.0. Copy
this one file, which needs only NumPy, beside a script and change its import to `import input_data`.

    mnist = input_data.read_data_sets('MNIST_data', one_hot=True)
    images, labels = mnist.train.next_batch(50)     # [50, 784] in [0, 1], [50, 10]

The files are in the IDX format: big-endian 32-bit numbers (a magic number, 2048 + the number of
dimensions, and the length of each), then a byte per pixel (0 background, 255 ink) or label. Format
and data: Y. LeCun, C. Cortes, C. J. C. Burges, http://yann.lecun.com/exdb/mnist/
"""

import collections
import contextlib
import gzip
import hashlib
import http.client
import io
import math
import operator
import os
import sys
import tempfile
import threading
import time
import urllib.request
import zlib

import numpy as np

DEFAULT_SOURCE_URL = 'https://storage.googleapis.com/cvdf-datasets/mnist/'
_MIRRORS = (DEFAULT_SOURCE_URL, 'https://ossci-datasets.s3.amazonaws.com/mnist/')
_MNIST_URLS = (*_MIRRORS, 'http://yann.lecun.com/exdb/mnist/',  # the mirrors serve them all
               'https://yann.lecun.com/exdb/mnist/')
_TIMEOUT = 15  # seconds to connect, and without a byte, before a server counts as stalled
_PAUSES = (0, 1, 3)  # seconds before each round through the mirrors
_MOST = 1 << 30  # bytes of one download: a server that never stops sending would fill the memory

# The files, named so or with .gz, and the SHA-256 of MNIST's own, unpacked. Other data sets
# (Fashion-MNIST, KMNIST) come under the same names.
_FILES = {
    'train-images-idx3-ubyte': 'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db',
    'train-labels-idx1-ubyte': '65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5',
    't10k-images-idx3-ubyte': '0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7',
    't10k-labels-idx1-ubyte': 'ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2',
}

Datasets = collections.namedtuple('Datasets', ['train', 'validation', 'test'])

# Data sets that follow TensorFlow's seed draw from this; as in 1.x, each new one starts it afresh.
_GRAPH_RANDOM = np.random.RandomState()
_MAX_SEED = 2**31 - 1  # 1.x counts seeds up to here; it also stands for two seeds of 0
_LOCK = threading.RLock()  # a program's threads take turns, so that each example is drawn once
if hasattr(os, 'register_at_fork'):  # no child begins with a lock that another thread had
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release,
                        after_in_child=_LOCK.release)


def read_data_sets(train_dir, fake_data=False, one_hot=False, dtype=np.float32, reshape=True,
                   validation_size=5000, seed=None, source_url=DEFAULT_SOURCE_URL):
    """Loads the four files of a data set in MNIST's format; downloads those that are missing.

    Args:
        train_dir: folder of the four files, gzipped or unpacked; made if it does not exist. '~' is
            the home folder, '' the working folder.
        fake_data: True for data sets of ones, without files, to test a program with.
        one_hot: True for labels as one-hot rows, False for the class numbers.
        dtype: float32 (or float) for images in [0, 1], uint8 for 0..255; TensorFlow's, NumPy's or
            the name.
        reshape: True for flat images [n, rows * columns], False for [n, rows, columns, 1].
        validation_size: how many training examples, from the first on, are kept for validation.
        seed: of the minibatches' order, an int. None: TensorFlow's seed, if the program has set one
            before (`tf.set_random_seed(777)`), and the three data sets then draw their orders from
            one generator; otherwise NumPy's global generator, so that `np.random.seed(42)` repeats
            the order, even after loading. NumPy's global generator is never reseeded.
        source_url: where missing files come from: a file's name is appended to it.

    Returns:
        `Datasets(train, validation, test)`, each a `DataSet`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or out of range.
        ValueError: a file is damaged or does not fit the others. If it is one of MNIST's own, it is
            downloaded again instead, and the damaged one is set aside as `NAME.damaged-...`.
        OSError: the folder cannot be used, or no source has a good file.
    """
    options = {'one_hot': one_hot, 'dtype': dtype, 'reshape': reshape, 'seed': seed}
    fake = DataSet([], [], fake_data=True, **options)  # refuses a bad option before any work
    if fake_data:
        return Datasets(fake, fake, fake)
    train_images, train_labels, test_images, test_labels = _load_files(
        _local_folder(train_dir), source_url or DEFAULT_SOURCE_URL, one_hot)
    if not 0 <= validation_size <= len(train_images):
        raise ValueError(f'validation_size is {validation_size}, expected 0 to '
                         f'{len(train_images)}, the number of training examples')
    split = operator.index(validation_size)
    return Datasets(train=DataSet(train_images[split:], train_labels[split:], **options),
                    validation=DataSet(train_images[:split], train_labels[:split], **options),
                    test=DataSet(test_images, test_labels, **options))


def load_mnist(train_dir='MNIST-data'):
    """Loads MNIST with `read_data_sets` and its defaults."""
    return read_data_sets(train_dir)


class DataSet:
    """Images and their labels, handed out in minibatches, epoch by epoch.

    Args:
        images: uint8 array [n, rows, columns, 1], values 0..255.
        labels: array [n] of class numbers, or one-hot [n, classes].
        fake_data: True for 10,000 examples of 784 ones and class 0; images and labels unused.
        one_hot: whether the labels of fake data are one-hot rows.
        dtype, reshape, seed: as for `read_data_sets`, and so are the errors.

    Attributes:
        images, labels: all of them, in the given order; what is written into them shows in batches.
            float32 images are made when they are first asked for.
        num_examples: how many there are.
        epochs_completed: how often they were gone through; goes up with a new epoch's first batch.
    """

    # Some 1.x programs have a subclass that sets the names with an underscore itself, and never
    # calls __init__: this is what it does not know of.
    _fake_data, _random, _order = False, None, np.arange(0)

    def __init__(self, images, labels, fake_data=False, one_hot=False, dtype=np.float32,
                 reshape=True, seed=None):
        if dtype is float or str(dtype) == 'float':  # 1.x's other names of float32
            dtype = np.float32
        found = np.dtype(getattr(dtype, 'as_numpy_dtype', dtype))  # which TensorFlow's have
        if found not in (np.float32, np.uint8):
            raise TypeError(f'dtype is {dtype!r}, expected float32 or uint8')
        self._random = _generator(seed)
        self._fake_data, self._one_hot = fake_data, one_hot
        if fake_data:
            images, labels = np.ones((0, 1, 784, 1), np.uint8), np.zeros(0, np.uint8)
        images, self._labels = np.asarray(images), np.asarray(labels)
        if len(images) != len(labels) or reshape and images.shape[3:] != (1,):
            raise ValueError(f'images {list(images.shape)} and labels {list(self._labels.shape)}, '
                             'expected as many labels as images, and images [n, rows, columns, 1]')
        if reshape:
            images = images.reshape(len(images), images.shape[1] * images.shape[2])

        # Bytes that nobody can change stay bytes, until somebody looks: a quarter of the memory.
        self._as_bytes = (found == np.float32 and images.dtype == np.uint8
                          and not images.flags.writeable)
        self._pixels = images if self._as_bytes or found == np.uint8 else _scale(images)
        self._order = np.arange(len(images))
        self._num_examples = 10000 if fake_data else len(images)
        self._epochs_completed = 0
        self._index_in_epoch = 0  # the next batch's first row in this epoch's order

    images = property(lambda self: self._images)
    labels = property(lambda self: self._labels)
    num_examples = property(lambda self: self._num_examples)
    epochs_completed = property(lambda self: self._epochs_completed)

    # Programs of 1.x read and write the names with an underscore, too. `_images` and `_labels` keep
    # the given order here, where 1.x put them into the order of the batches.

    @property
    def _images(self):
        """All images. Who has them may write into them: from now on they are this data set's own,
        and of its dtype.
        """
        with _LOCK:
            if self._as_bytes:
                self._pixels, self._as_bytes = _scale(self._pixels), False
            elif not self._pixels.flags.writeable:  # the training and validation sets share it
                self._pixels = self._pixels.copy()
            return self._pixels

    @_images.setter
    def _images(self, images):
        with _LOCK:
            self._pixels, self._as_bytes = np.asarray(images), False
            if len(images) != len(self._order):
                self._order = np.arange(len(images))

    def next_batch(self, batch_size, fake_data=False, shuffle=True):
        """The next examples of this epoch and, if it ends, of those that follow.

        Args:
            batch_size: how many, an int. An empty data set has empty batches. As in 1.x, a number
                below 0 goes back by as many examples, and gives an empty batch if there are as
                many.
            fake_data: True for ones and class 0 instead.
            shuffle: whether an epoch that begins with this batch gets a new order.

        Returns:
            images [batch_size, ...] and labels [batch_size, ...], copies.
        """
        batch_size = operator.index(batch_size)
        if fake_data or self._fake_data:
            classes = np.zeros(batch_size, np.uint8)
            labels = dense_to_one_hot(classes, 10) if self._one_hot else classes
            return np.ones((batch_size, 784), np.float32), labels

        # The batch's rows: a slice of this epoch's order and, if that ends, of the next ones'.
        with _LOCK:
            if shuffle and self._index_in_epoch == self._epochs_completed == 0:
                self._shuffle()
            start, n = self._index_in_epoch, self._num_examples
            end = start + batch_size
            slices = [self._order[start:min(end, n)]]
            while end > n:
                self._epochs_completed += 1
                if shuffle:
                    self._shuffle()
                end -= n
                slices.append(self._order[:min(end, n)])
                if not n:
                    break
            self._index_in_epoch = end
            images, as_bytes = self._pixels, self._as_bytes
        rows = np.concatenate(slices) if len(slices) > 1 else slices[0]
        images, labels = np.take(images, rows, axis=0), np.take(self._labels, rows, axis=0)
        return _scale(images) if as_bytes else images, labels

    def _shuffle(self):
        """Gives the examples a new order: as in 1.x, the old one shuffled, not a fresh one."""
        random = self._random or np.random  # the module has the global generator's functions
        self._order = self._order[random.permutation(self._num_examples)]


def extract_images(f):
    """The images in a gzipped IDX file, uint8 [n, rows, columns, 1]; ValueError: it is damaged.

    `f` is a binary file object, from `open` or `gzip.open`.
    """
    return _read_idx(f, 'images')[..., np.newaxis]


def extract_labels(f, one_hot=False, num_classes=10):
    """The labels in such a file object, uint8 [n] or one-hot rows; ValueError: it is damaged."""
    labels = _read_idx(f, 'labels')
    return dense_to_one_hot(labels, num_classes) if one_hot else labels


def dense_to_one_hot(labels_dense, num_classes):
    """Class numbers [n] as one-hot rows, float64 [n, num_classes]; ValueError: one is too large."""
    labels_dense = np.asarray(labels_dense).ravel()
    if labels_dense.size and not 0 <= labels_dense.min() <= labels_dense.max() < num_classes:
        raise ValueError(f'labels from {labels_dense.min()} to {labels_dense.max()}, where one-hot '
                         f'rows of {num_classes} classes take 0 to {num_classes - 1}')
    labels_one_hot = np.zeros((len(labels_dense), num_classes))
    labels_one_hot[np.arange(len(labels_dense)), labels_dense] = 1
    return labels_one_hot


def maybe_download(filename, work_directory, source_url):
    """The path of a file in a folder; downloads it, from its whole URL, unless it is there.

    ValueError: the folder is a URL. OSError: it cannot be used, or no source has a good file.
    """
    path = os.path.join(_local_folder(work_directory), filename)
    if not os.path.exists(path):
        _fetch(path, source_url, f'{path} is missing')
    return path


def _generator(seed):
    """What draws the orders, with 1.x's results; None: NumPy's global generator, as it is then.

    1.x's own rule is `get_seed` in tensorflow/python/framework/random_seed.py.
    """
    tensorflow = sys.modules.get('tensorflow')  # if the program uses it
    graph_seed = tensorflow and tensorflow.compat.v1.get_default_graph().seed
    if graph_seed is not None:
        graph_seed %= _MAX_SEED
    if seed is not None:
        seed = operator.index(seed) % _MAX_SEED
        return np.random.RandomState(_MAX_SEED if seed == graph_seed == 0 else seed)
    if graph_seed is None:
        return None
    _GRAPH_RANDOM.seed(graph_seed)
    return _GRAPH_RANDOM


def _scale(images):
    """float32 [0, 1] for bytes 0..255."""
    return np.multiply(images, np.float32(1 / 255), dtype=np.float32)


def _local_folder(folder):
    """The folder's path, for a file's name to be joined to it; ValueError: it is a URL."""
    folder = os.path.expanduser(folder) or os.curdir
    if '://' in folder[2:]:  # from the third character on, as C:// is a disk
        raise ValueError(f'{folder} is a URL, expected a folder of this machine: copy the files '
                         'into one, or name the URL as source_url')
    return folder


def _load_files(folder, source_url, one_hot):
    """The arrays in the four files, in _FILES's order; fetches what is missing or damaged."""
    arrays, faults, damaged = {}, {}, {}  # by name: what is wrong, and the path of what is damaged
    for name in _FILES:
        path = _existing_path(folder, name)
        try:
            with open(path, 'rb') as f:
                arrays[name] = _read_idx(f, name)
        except (FileNotFoundError, NotADirectoryError):
            faults[name] = f'{path} is missing'
        except ValueError as error:
            faults[name], damaged[name] = f'{path} is damaged: {error}', path

    # Data sets are never mixed: MNIST's mirrors fill no gap among another data set's files. Nobody
    # knows the right contents of those, so that nothing damaged among them is replaced.
    if source_url in _MNIST_URLS:
        for name in arrays if faults else ():
            if _sha256(arrays[name]) != _FILES[name]:
                raise ValueError(f"{next(iter(faults.values()))}; MNIST's mirrors cannot help, as "
                                 f'{name} is not from MNIST: copy the right file there')
    elif damaged:
        raise ValueError(f'{faults[next(iter(damaged))]}; copy a good file there, or delete it to '
                         f'have it downloaded from {source_url}')
    for name, fault in faults.items():
        arrays[name] = _fetch(os.path.join(folder, f'{name}.gz'), f'{source_url}{name}.gz', fault,
                              damaged.get(name))

    train_images, train_labels, test_images, test_labels = (arrays[name] for name in _FILES)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ValueError(f'{folder} has training images {list(train_images.shape)} and test images '
                         f'{list(test_images.shape)}: they belong to different data sets')
    for images in (train_images, test_images):
        images.flags.writeable = False  # the data sets share them
    if one_hot:
        train_labels, test_labels = (dense_to_one_hot(labels, 10)
                                     for labels in (train_labels, test_labels))
    return train_images[..., np.newaxis], train_labels, test_images[..., np.newaxis], test_labels


def _existing_path(folder, name):
    """Where the file is, gzipped or unpacked; if it is nowhere, where it will be: gzipped."""
    dotted = name.replace('-idx', '.idx')  # its name inside the .gz, which 7-Zip gives it
    paths = [os.path.join(folder, found) for found in (f'{name}.gz', name, f'{dotted}.gz', dotted)]
    return next(filter(os.path.isfile, paths), paths[0])


def _read_idx(f, kind):
    """The array in an IDX file, of 'images' or 'labels', gzipped or not; ValueError: its fault."""
    ndim = 3 if 'images' in kind else 1
    magic, header_size = 2048 + ndim, 4 + 4 * ndim
    # 1.x took file objects of gzip data. One that can be peeked into may also be of an unpacked
    # file, or from `gzip.open`.
    is_gzip = not hasattr(f, 'peek') or f.peek(2)[:2] == b'\x1f\x8b'
    stream = gzip.GzipFile(fileobj=f) if is_gzip else f
    try:
        header = stream.read(header_size)
        if len(header) < header_size or header[:4] != magic.to_bytes(4, 'big'):
            raise ValueError(f'it begins with {header!r}, expected magic number {magic} and a '
                             f'length for each of {ndim} dimensions')
        shape = np.frombuffer(header, '>u4')[1:].tolist()
        promised = math.prod(shape)

        # Piece by piece, so that a wrong header cannot ask for more memory than there are bytes.
        data = bytearray()
        while len(data) <= promised and (piece := stream.read(1 << 20)):
            data += piece
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f'its gzip data is broken ({error})') from error
    if len(data) != promised:
        found = f'{len(data):,}' if len(data) < promised else 'more'
        raise ValueError(f'its header promises {promised:,} bytes, {shape}, but it holds {found}')
    return np.frombuffer(data, np.uint8).reshape(shape)


def _sha256(array):
    """SHA-256 of the IDX file that holds the array."""
    header = np.array([2048 + array.ndim, *array.shape], '>u4')
    return hashlib.sha256(header.tobytes() + array.tobytes()).hexdigest()


def _fetch(path, url, fault, damaged=None):
    """Downloads a file to a path; returns its array, or None if it is not one of _FILES.

    `fault` says why, for the messages. `damaged` is the path of the file that it replaces, which is
    kept under another name.
    """
    folder, packed = os.path.split(path)
    with _written_in(folder, fault):
        os.makedirs(folder, exist_ok=True)
    body, array = _download(url, packed, fault)

    # The file gets its name in one step, when it is whole, as this process may be killed.
    with _written_in(folder, fault), tempfile.TemporaryDirectory(dir=folder) as beside:
        part = os.path.join(beside, packed)
        with open(part, 'xb') as f:
            f.write(body)
        if damaged:
            aside = f'{damaged}.damaged-{time.time_ns()}'
            with contextlib.suppress(FileNotFoundError):  # another process has repaired it
                os.rename(damaged, aside)
                print(f'{fault}; set aside as {aside}, downloaded again',
                      file=sys.stderr or io.StringIO())  # None: a program without one
        os.replace(part, path)
    return array


@contextlib.contextmanager
def _written_in(folder, fault):
    """Lets an OSError say that the folder cannot be written to, and why that was tried."""
    try:
        yield
    except OSError as error:
        raise OSError(f'{fault}, and the folder {folder} cannot be written to ({error.strerror}): '
                      'name another one') from error


def _download(url, packed, fault):
    """A file's bytes and its array, from the URL or, if it is MNIST's, from the mirrors in turn."""
    name = packed.removesuffix('.gz')
    is_mnist = name in _FILES and url.removesuffix(packed) in _MNIST_URLS
    urls = [url]
    if is_mnist:  # the mirror that is asked for comes first
        urls = sorted((mirror + packed for mirror in _MIRRORS), key=lambda mirror: mirror != url)
    reasons = {}  # by URL: why it failed
    for pause in _PAUSES:
        time.sleep(pause)
        for source in urls:
            try:
                body = _read_url(source)
                array = None
                if name in _FILES:
                    array = _read_idx(io.BufferedReader(io.BytesIO(body)), name)
                if is_mnist and _sha256(array) != _FILES[name]:
                    raise ValueError("another file than MNIST's (by its SHA-256)")
                return body, array
            except (OSError, http.client.HTTPException, ValueError) as error:
                reasons[source] = str(error) or repr(error)
    tried = '; '.join(f'{source}: {reason}' for source, reason in reasons.items())
    raise OSError(f'{fault}, and could not be downloaded from {tried}; put the file there by hand')


def _read_url(url):
    """The bytes at a URL; a terminal shows how many have come."""
    body = bytearray()
    on_terminal = sys.stderr is not None and sys.stderr.isatty()  # None: a program without one
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            size = int(response.headers['Content-Length'] or 0)
            while piece := response.read(1 << 16):
                body += piece
                if len(body) > _MOST:
                    raise ValueError(f'it sends more than {_MOST:,} bytes')
                if on_terminal:
                    done = f'{len(body) / size:4.0%}' if size else f'{len(body):,} bytes'
                    print(f'\r{url} {done}', end='', file=sys.stderr, flush=True)
    finally:
        if on_terminal:
            print(file=sys.stderr)
    if size and len(body) != size:
        raise ConnectionError(f'cut off after {len(body):,} of {size} bytes')
    return body
