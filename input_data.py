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
import os
import sys
import tempfile
import time
import urllib.request
import zlib

import numpy as np

DEFAULT_SOURCE_URL = 'https://storage.googleapis.com/cvdf-datasets/mnist/'
_MIRRORS = (DEFAULT_SOURCE_URL, 'https://ossci-datasets.s3.amazonaws.com/mnist/')
_OF_MNIST = (DEFAULT_SOURCE_URL, 'http://yann.lecun.com/exdb/mnist/')  # served by the mirrors
_TIMEOUT = 15  # seconds to connect, and without a byte, before a server counts as stalled
_PAUSES = (0, 1, 3)  # seconds before each round through the mirrors
_REFUSALS = (400, 401, 403, 404, 410)  # HTTP's status codes that a second try does not change

# The files, named so or with .gz, and the SHA-256 of MNIST's own, unpacked. Other data sets
# (Fashion-MNIST, KMNIST) come under the same names.
_FILES = {
    'train-images-idx3-ubyte': 'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db',
    'train-labels-idx1-ubyte': '65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5',
    't10k-images-idx3-ubyte': '0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7',
    't10k-labels-idx1-ubyte': 'ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2',
}

Datasets = collections.namedtuple('Datasets', ['train', 'validation', 'test'])


def read_data_sets(train_dir, fake_data=False, one_hot=False, dtype=np.float32, reshape=True,
                   validation_size=5000, seed=None, source_url=DEFAULT_SOURCE_URL):
    """Loads the four files of a data set in MNIST's format; downloads those that are missing.

    Args:
        train_dir: folder of the four files, gzipped or unpacked; made if it is not there.
        fake_data: True for data sets of ones, without files, to test a program with.
        one_hot: True for labels as one-hot rows, False for the class numbers.
        dtype: float32 for images in [0, 1], uint8 for 0..255; TensorFlow's, NumPy's or the name.
        reshape: True for flat images [n, rows * columns], False for [n, rows, columns, 1].
        validation_size: how many training examples, from the first on, are kept for validation.
        seed: of the minibatches' order, 0 to 2**32 - 1; None for another order in each run.
        source_url: where missing files come from: a file's name is appended to it.

    Returns:
        `Datasets(train, validation, test)`, each a `DataSet`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or out of range.
        ValueError: a file is damaged or does not fit the others. One of MNIST's own is downloaded
            anew instead, and the damaged one set aside as `NAME.damaged-...`.
        OSError: the folder cannot be used, or no source gave a good file.
    """
    options = {'one_hot': one_hot, 'dtype': dtype, 'reshape': reshape, 'seed': seed}
    split = _whole_number('validation_size', validation_size, 0)
    fake = DataSet([], [], fake_data=True, **options)  # refuses a bad option before any work
    if fake_data:
        return Datasets(fake, fake, fake)
    train_images, train_labels, test_images, test_labels = _load(
        os.fspath(train_dir), source_url or DEFAULT_SOURCE_URL, one_hot)
    _whole_number('validation_size', validation_size, 0, len(train_images))
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
        images, labels: all of them, in the given order; what is written there shows in batches.
        num_examples: how many there are.
        epochs_completed: how often they were gone through; goes up with a new epoch's first batch.
    """

    def __init__(self, images, labels, fake_data=False, one_hot=False, dtype=np.float32,
                 reshape=True, seed=None):
        found = np.dtype(getattr(dtype, 'as_numpy_dtype', dtype))  # which TensorFlow's have
        if found not in (np.float32, np.uint8):
            raise TypeError(f'dtype is {dtype!r}, expected float32 or uint8')
        if seed is not None:  # 1.x took seeds modulo 2**31 - 1
            seed = _whole_number('seed', seed, 0, 2**32 - 1) % (2**31 - 1)
        self._random = np.random.RandomState(seed)  # its own, with 1.x's orders
        self._fake_data, self._one_hot = fake_data, one_hot
        if fake_data:
            images, labels = np.ones((0, 1, 784, 1), np.uint8), np.zeros(0, np.uint8)
        images, self.labels = np.asarray(images), np.asarray(labels)
        if len(images) != len(labels) or reshape and images.shape[3:] != (1,):
            raise ValueError(f'images {list(images.shape)} and labels {list(self.labels.shape)}, '
                             'expected as many, and images [n, rows, columns, 1] to reshape')
        if reshape:
            images = images.reshape(len(images), images.shape[1] * images.shape[2])

        # Bytes that nobody can change stay bytes, until `images` is asked for: a quarter of it all.
        self._as_bytes = (found == np.float32 and images.dtype == np.uint8
                          and not images.flags.writeable)
        self._images = images if self._as_bytes or found == np.uint8 else _scale(images)
        self.num_examples = 10000 if fake_data else len(images)
        self.epochs_completed = self._index_in_epoch = 0
        self._order = np.arange(len(images))

    @property
    def images(self):
        """All images; float32 ones are made when they are first asked for."""
        if self._as_bytes:
            self._images, self._as_bytes = _scale(self._images), False
        elif not self._images.flags.writeable:
            self._images = self._images.copy()
        return self._images

    def next_batch(self, batch_size, fake_data=False, shuffle=True):
        """The next examples of this epoch and, if it ends, of those that follow.

        Args:
            batch_size: how many, from 1 on; TypeError, ValueError: another, or the set is empty.
            fake_data: True for ones and class 0 instead.
            shuffle: whether an epoch that begins with this batch gets a new order.

        Returns:
            images [batch_size, ...] and labels [batch_size, ...], copies.
        """
        batch_size = _whole_number('batch_size', batch_size, 1)
        if fake_data or self._fake_data:
            classes = np.zeros(batch_size, np.uint8)
            labels = dense_to_one_hot(classes, 10) if self._one_hot else classes
            return np.ones((batch_size, 784), np.float32), labels
        if not self.num_examples:
            raise ValueError('this data set has no examples to take a batch from')

        # The batch's rows: a slice of this epoch's order and, if that ends, of the next ones'.
        slices = []
        missing = batch_size
        while missing:
            if self._index_in_epoch == self.num_examples:
                self.epochs_completed += 1
                self._index_in_epoch = 0
            if self._index_in_epoch == 0 and shuffle:
                # As in TensorFlow 1.x, a new order is the old one shuffled, not a fresh one.
                self._order = self._order[self._random.permutation(self.num_examples)]
            start = self._index_in_epoch
            rows = self._order[start:start + missing]
            slices.append(rows)
            self._index_in_epoch += len(rows)
            missing -= len(rows)
        if len(slices) > 1:
            rows = np.concatenate(slices)
        images = self._images.take(rows, axis=0)
        if self._as_bytes:
            images = _scale(images)
        return images, self.labels.take(rows, axis=0)


def extract_images(f):
    """The images in a gzipped IDX file, uint8 [n, rows, columns, 1]; ValueError: it is damaged."""
    return _read_idx(gzip.GzipFile(fileobj=f), 'images')[..., np.newaxis]


def extract_labels(f, one_hot=False, num_classes=10):
    """The labels in a gzipped IDX file, uint8 [n] or one-hot rows; ValueError: it is damaged."""
    labels = _read_idx(gzip.GzipFile(fileobj=f), 'labels')
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

    OSError: the folder cannot be used, or no source gave a good file.
    """
    path = os.path.join(work_directory, filename)
    if not os.path.exists(path):
        _fetch(path, source_url, f'{path} is missing')
    return path


def _whole_number(name, value, least, most=math.inf):
    """The value as an int; TypeError, ValueError: it is none, or out of range."""
    message = f'{name} is {value!r}, expected a whole number from {least} to {most}'
    if not hasattr(value, '__index__'):
        raise TypeError(message)
    if not least <= value <= most:
        raise ValueError(message)
    return int(value)


def _scale(images):
    """float32 [0, 1] for bytes 0..255."""
    return np.multiply(images, np.float32(1 / 255), dtype=np.float32)


# The way of the bytes: _load opens the four files, and _read_idx unpacks and checks each. If one is
# missing or damaged, _fetch puts a new one in its place: _download tries the mirrors in turn, and
# _get reads from one URL.


def _load(folder, source_url, one_hot):
    """The arrays in the four files, in _FILES's order; fetches what is missing or damaged."""
    arrays, missing, damaged = {}, {}, {}  # by name; the last two say what is wrong
    paths = {name: _path(folder, name) for name in _FILES}
    for name, path in paths.items():
        try:
            with open(path, 'rb') as f:
                arrays[name] = _read_idx(f, name)
        except (FileNotFoundError, NotADirectoryError):
            missing[name] = f'{path} is missing'
        except ValueError as error:
            damaged[name] = f'{path} is damaged: {error}'

    faults = missing | damaged
    if faults:
        _refuse_if_not_mnist(arrays, missing, damaged, source_url)
    for name, fault in faults.items():
        arrays[name] = _fetch(os.path.join(folder, f'{name}.gz'), f'{source_url}{name}.gz', fault,
                              paths[name] if name in damaged else None)

    names = list(_FILES)
    for images, labels in (names[:2], names[2:]):
        if len(arrays[images]) != len(arrays[labels]):
            raise ValueError(f'{images} holds {len(arrays[images])} images, but {labels} '
                             f'{len(arrays[labels])} labels: they belong to different data sets')
        arrays[images] = arrays[images][..., np.newaxis]
        arrays[images].flags.writeable = False  # the data sets share it
        if one_hot:
            try:
                arrays[labels] = dense_to_one_hot(arrays[labels], 10)
            except ValueError as error:
                raise ValueError(f'{labels}: {error}; one_hot=False reads it') from None
    return [arrays[name] for name in names]


def _path(folder, name):
    """Where the file is: gzipped or, if only that is there, unpacked."""
    path = os.path.join(folder, name)
    if os.path.exists(path) and not os.path.exists(f'{path}.gz'):
        return path
    return f'{path}.gz'


def _refuse_if_not_mnist(arrays, missing, damaged, source_url):
    """ValueError: what would be fetched does not belong to the files that are there."""
    if source_url in _OF_MNIST:
        others = [name for name in arrays if _sha256(arrays[name]) != _FILES[name]]
        if not others:
            return
        fault = next(iter((missing | damaged).values()))
        reason = f' ({others[0]} is not from MNIST)'
    else:  # nobody knows its right contents, so nothing of it is replaced
        if not damaged:
            return
        fault = next(iter(damaged.values()))
        reason = ''
    raise ValueError(f"{fault}; MNIST's mirrors cannot repair this data set{reason}: put a whole "
                     'copy there by hand, or delete it to have it fetched from its source_url '
                     f'(now {source_url})')


def _read_idx(f, kind):
    """The array in an IDX file, of 'images' or 'labels', gzipped or not; ValueError: its fault."""
    ndim = 3 if 'images' in kind else 1
    magic = 2048 + ndim
    header_size = 4 + 4 * ndim
    try:
        is_gzip = f.peek(2)[:2] == b'\x1f\x8b'
        stream = gzip.GzipFile(fileobj=f) if is_gzip else f
        header = stream.read(header_size)
        if len(header) < header_size or header[:4] != magic.to_bytes(4, 'big'):
            raise ValueError(f'it begins with {header!r}, expected magic number {magic} and a '
                             f'length for each of {ndim} dimensions')
        shape = np.frombuffer(header, '>u4')[1:].tolist()
        promised = math.prod(shape)

        # Piece by piece, so that a wrong header cannot ask for more memory than there are bytes.
        data = bytearray()
        while len(data) <= promised:
            piece = stream.read(1 << 20)
            if not piece:
                break
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

    `fault` says why, for the messages. `damaged` is the path of a file to be replaced, which is
    renamed and kept.
    """
    folder, packed = os.path.split(path)
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, f'the data cannot be written here ({error.strerror}): name a '
                      'folder that can be written', folder) from error
    body, array = _download(url, packed, fault)
    # Other processes may do the same. A file gets its name when it is whole, not before.
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        part = os.path.join(beside, packed)
        with open(part, 'xb') as f:
            f.write(body)
        if damaged:
            aside = f'{damaged}.damaged-{os.urandom(4).hex()}'
            with contextlib.suppress(FileNotFoundError):  # another process has renamed it
                os.rename(damaged, aside)
            print(f'{fault}; set aside as {aside}, fetched anew', file=sys.stderr)
        os.replace(part, path)
    return array


def _download(url, packed, fault):
    """A file's bytes and its array, from the URL or, if it is MNIST's, from the mirrors in turn."""
    name = packed.removesuffix('.gz')
    is_mnist = name in _FILES and url.removesuffix(packed) in _OF_MNIST
    urls = [mirror + packed for mirror in _MIRRORS] if is_mnist else [url]
    reasons = {}  # by URL: why it failed
    for pause in _PAUSES:
        if not urls:
            break
        time.sleep(pause)
        for source in list(urls):
            try:
                body = _get(source)
                array = None
                if name in _FILES:
                    array = _read_idx(io.BufferedReader(io.BytesIO(body)), name)
                if is_mnist and _sha256(array) != _FILES[name]:
                    raise ValueError("another file than MNIST's (by its SHA-256)")
                return body, array
            except (OSError, http.client.HTTPException, ValueError) as error:
                reasons[source] = str(error) or repr(error)
                if getattr(error, 'code', None) in _REFUSALS:
                    urls.remove(source)
    tried = '; '.join(f'{source}: {reason}' for source, reason in reasons.items())
    raise OSError(f'{fault}, and could not be fetched from {tried}; put the file there by hand')


def _get(url):
    """All bytes at a URL; on a terminal, standard error shows how many there are so far."""
    body = bytearray()
    on_terminal = sys.stderr.isatty()
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            size = int(response.headers['Content-Length'] or 0)
            while True:
                piece = response.read(1 << 16)
                if not piece:
                    break
                body += piece
                if on_terminal:
                    done = f'{len(body) / size:4.0%}' if size else f'{len(body):,} bytes'
                    print(f'\r{url} {done}', end='', file=sys.stderr, flush=True)
    finally:
        if on_terminal:
            print(file=sys.stderr)
    if size and len(body) != size:
        raise ConnectionError(f'cut off after {len(body):,} of {size} bytes')
    return body
