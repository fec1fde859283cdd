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
import threading
import time
import urllib.request
import zlib

import numpy as np

DEFAULT_SOURCE_URL = 'https://storage.googleapis.com/cvdf-datasets/mnist/'
_MIRRORS = (DEFAULT_SOURCE_URL, 'https://ossci-datasets.s3.amazonaws.com/mnist/')
_MNIST_URLS = (*_MIRRORS, 'http://yann.lecun.com/exdb/mnist/',  # the mirrors serve them all
               'https://yann.lecun.com/exdb/mnist/')
_MNIST_MOST = 48 << 20  # bytes: the largest of its files, unpacked, has 47,040,016
_OTHER_MOST = 4 << 30  # bytes of another data set's file
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

# What data sets that follow TensorFlow's seed draw from; as in 1.x, each new one starts it afresh.
_GRAPH_RANDOM = np.random.RandomState()
_TURNS = threading.Lock()  # a program's threads take turns, so that each example is drawn once


def read_data_sets(train_dir, fake_data=False, one_hot=False, dtype=np.float32, reshape=True,
                   validation_size=5000, seed=None, source_url=DEFAULT_SOURCE_URL):
    """Loads the four files of a data set in MNIST's format; downloads those that are missing.

    Args:
        train_dir: folder of the four files, gzipped or unpacked; made if it is not there. '~' is
            the home folder, '' the working folder.
        fake_data: True for data sets of ones, without files, to test a program with.
        one_hot: True for labels as one-hot rows, False for the class numbers.
        dtype: float32 (or float) for images in [0, 1], uint8 for 0..255; TensorFlow's, NumPy's or
            the name.
        reshape: True for flat images [n, rows * columns], False for [n, rows, columns, 1].
        validation_size: how many training examples, from the first on, are kept for validation.
        seed: of the minibatches' order, 0 to 2**32 - 1. None: TensorFlow's seed, if the program has
            set one before (`tf.set_random_seed(777)`), and the three data sets then draw their
            orders from one generator; else NumPy's global generator, which `np.random.seed(42)`
            makes repeat itself, also after loading. NumPy's global generator is never reseeded.
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
    train_images, train_labels, test_images, test_labels = _load_files(
        _local_folder(train_dir), source_url or DEFAULT_SOURCE_URL, one_hot)
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
        images, labels: all of them, in the given order; what is written into them shows in batches.
            float32 images are made when they are first asked for.
        num_examples: how many there are.
        epochs_completed: how often they were gone through; goes up with a new epoch's first batch.
    """

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
                             'expected as many, and images [n, rows, columns, 1] to reshape')
        if reshape:
            images = images.reshape(len(images), images.shape[1] * images.shape[2])

        # Bytes that nobody can change stay bytes, until somebody looks: a quarter of it all.
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
        with _TURNS:
            if self._as_bytes:
                self._pixels, self._as_bytes = _scale(self._pixels), False
            elif not self._pixels.flags.writeable:
                self._pixels = self._pixels.copy()
            return self._pixels

    @_images.setter
    def _images(self, images):
        with _TURNS:
            self._pixels, self._as_bytes = np.asarray(images), False
            if len(images) != len(self._order):
                self._order = np.arange(len(images))

    def next_batch(self, batch_size, fake_data=False, shuffle=True):
        """The next examples of this epoch and, if it ends, of those that follow.

        Args:
            batch_size: how many, from 0 on; TypeError, ValueError: another, or the set is empty.
            fake_data: True for ones and class 0 instead.
            shuffle: whether an epoch that begins with this batch gets a new order.

        Returns:
            images [batch_size, ...] and labels [batch_size, ...], copies.
        """
        batch_size = _whole_number('batch_size', batch_size, 0)
        if fake_data or self._fake_data:
            classes = np.zeros(batch_size, np.uint8)
            labels = dense_to_one_hot(classes, 10) if self._one_hot else classes
            return np.ones((batch_size, 784), np.float32), labels

        # The batch's rows: a slice of this epoch's order and, if that ends, of the next ones'.
        with _TURNS:
            if shuffle and self._index_in_epoch == self._epochs_completed == 0:
                self._shuffle()
            start = self._index_in_epoch
            rows = self._order[start:min(start + batch_size, self._num_examples)]
            self._index_in_epoch = start + len(rows)
            slices, missing = [rows], batch_size - len(rows)
            while missing:
                if min(self._num_examples, len(self._order)) < 1:
                    raise ValueError('this data set has no examples to take a batch from')
                self._epochs_completed += 1
                if shuffle:
                    self._shuffle()
                slices.append(self._order[:self._num_examples][:missing])
                missing -= len(slices[-1])
                self._index_in_epoch = len(slices[-1])
            images, as_bytes = self._pixels, self._as_bytes
        if len(slices) > 1:
            rows = np.concatenate(slices)
        images = images.take(rows, axis=0)
        return _scale(images) if as_bytes else images, self._labels.take(rows, axis=0)

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

    ValueError: the folder is a URL. OSError: it cannot be used, or no source gave a good file.
    """
    path = os.path.join(_local_folder(work_directory), filename)
    if not os.path.exists(path):
        _replace_file(path, source_url, f'{path} is missing')
    return path


def _whole_number(name, value, least, most=math.inf):
    """The value as an int; TypeError, ValueError: it is none, or out of range."""
    if not hasattr(value, '__index__'):
        error = TypeError
    elif not least <= value <= most:
        error = ValueError
    else:
        return int(value)
    limit = f'from {least} to {most}' if most < math.inf else f'from {least} on'
    raise error(f'{name} is {value!r}, expected a whole number {limit}')


def _generator(seed):
    """What draws the orders, with 1.x's results; None: NumPy's global generator, as it is then."""
    if seed is not None:  # 1.x took seeds modulo 2**31 - 1
        return np.random.RandomState(_whole_number('seed', seed, 0, 2**32 - 1) % (2**31 - 1))
    # Not tf.get_seed, which in 2.x changes the seeds of the program's later operations.
    tf_seeds = sys.modules.get('tensorflow.python.framework.random_seed')
    try:
        if tf_seeds.context.executing_eagerly():
            seed = tf_seeds.context.global_seed()
        else:
            seed = tf_seeds.ops.get_default_graph().seed
    except AttributeError:  # TensorFlow is not imported, or not to its end
        pass
    if seed is None:
        return None
    _GRAPH_RANDOM.seed(seed % (2**31 - 1))
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
    arrays, missing, damaged = {}, {}, {}  # by name; the last two say what is wrong
    paths = {name: _existing_path(folder, name) for name in _FILES}
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
        arrays[name] = _replace_file(os.path.join(folder, f'{name}.gz'), f'{source_url}{name}.gz',
                                     fault, paths[name] if name in damaged else None)

    names = list(_FILES)
    first = arrays[names[0]].shape
    for images, labels in (names[:2], names[2:]):
        shape = arrays[images].shape
        if 0 in shape:
            raise ValueError(f'{images} holds no images, {list(shape)}: put another one there')
        if shape[1:] != first[1:]:
            raise ValueError(f'{images} holds images {list(shape)}, but {names[0]} {list(first)}: '
                             'they belong to different data sets')
        if shape[0] != len(arrays[labels]):
            raise ValueError(f'{images} holds {shape[0]} images, but {labels} '
                             f'{len(arrays[labels])} labels: they belong to different data sets')
        arrays[images] = arrays[images][..., np.newaxis]
        arrays[images].flags.writeable = False  # the data sets share it
        if one_hot:
            try:
                arrays[labels] = dense_to_one_hot(arrays[labels], 10)
            except ValueError as error:
                raise ValueError(f'{labels}: {error}; one_hot=False reads it') from None
    return [arrays[name] for name in names]


def _existing_path(folder, name):
    """Where the file is, gzipped or unpacked; if it is nowhere, where it will be: gzipped."""
    dotted = name.replace('-idx', '.idx')  # its name inside the .gz, which 7-Zip gives it
    paths = [os.path.join(folder, found) for found in (f'{name}.gz', name, f'{dotted}.gz', dotted)]
    return next(filter(os.path.isfile, paths), paths[0])


def _refuse_if_not_mnist(arrays, missing, damaged, source_url):
    """ValueError: what would be fetched does not belong to the files that are there."""
    if source_url in _MNIST_URLS:
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


def _read_idx(f, kind, most=math.inf):
    """The array in an IDX file, of 'images' or 'labels', gzipped or not; ValueError: its fault."""
    try:
        stream, shape = _read_header(f, kind, most)
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


def _read_header(f, kind, most):
    """The stream behind an IDX file's header, and the shape in it; ValueError: its fault."""
    ndim = 3 if 'images' in kind else 1
    magic = 2048 + ndim
    header_size = 4 + 4 * ndim
    is_gzip = not hasattr(f, 'peek') or f.peek(2)[:2] == b'\x1f\x8b'  # `gzip.open` has unpacked it
    stream = gzip.GzipFile(fileobj=f) if is_gzip else f
    header = stream.read(header_size)
    if len(header) < header_size or header[:4] != magic.to_bytes(4, 'big'):
        raise ValueError(f'it begins with {header!r}, expected magic number {magic} and a length '
                         f'for each of {ndim} dimensions')
    shape = np.frombuffer(header, '>u4')[1:].tolist()
    if math.prod(shape) > most:
        raise ValueError(f'its header promises {math.prod(shape):,} bytes, {shape}, where {most:,} '
                         'are the most')
    return stream, shape


def _sha256(array):
    """SHA-256 of the IDX file that holds the array."""
    header = np.array([2048 + array.ndim, *array.shape], '>u4')
    return hashlib.sha256(header.tobytes() + array.tobytes()).hexdigest()


def _replace_file(path, url, fault, damaged=None):
    """Downloads a file to a path; returns its array, or None if it is not one of _FILES.

    `fault` says why, for the messages. `damaged` is the path of a file to be replaced, a copy of
    which is kept.
    """
    folder, packed = os.path.split(path)
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, f'{fault}, and the data cannot be written here '
                      f'({error.strerror}): name a folder that can be written', folder) from error
    body, array = _download_verified(url, packed, fault)

    # Other processes may do the same, and any may be killed. So a damaged file is looked at again,
    # and keeps its name until the good one takes it over in one step.
    if damaged:
        try:
            with open(damaged, 'rb') as f:
                content = f.read()
            _read_idx(io.BufferedReader(io.BytesIO(content)), packed)
            return array  # another process has repaired it
        except FileNotFoundError:
            pass
        except ValueError:
            aside = f'{damaged}.damaged-{hashlib.sha256(content).hexdigest()[:8]}'
            _write_whole(aside, content)
            print(f'{fault}; set aside as {aside}, fetched anew', file=sys.stderr)
    _write_whole(path, body)
    if damaged not in (None, path):
        with contextlib.suppress(FileNotFoundError):
            os.remove(damaged)
    return array


def _write_whole(path, content):
    """Writes a file that gets its name in one step, when it is whole."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as beside:
        part = os.path.join(beside, 'part')
        with open(part, 'xb') as f:
            f.write(content)
        os.replace(part, path)


def _download_verified(url, packed, fault):
    """A file's bytes and its array, from the URL or, if it is MNIST's, from the mirrors in turn."""
    name = packed.removesuffix('.gz')
    is_mnist = name in _FILES and url.removesuffix(packed) in _MNIST_URLS
    urls, most = [url], _OTHER_MOST
    if is_mnist:  # the mirror that is asked for comes first
        urls = sorted((mirror + packed for mirror in _MIRRORS), key=lambda mirror: mirror != url)
        most = _MNIST_MOST
    reasons = {}  # by URL: why it failed
    for pause in _PAUSES:
        if not urls:
            break
        time.sleep(pause)
        for source in list(urls):
            try:
                body = _read_url(source, name, most)
                array = None
                if name in _FILES:
                    array = _read_idx(io.BufferedReader(io.BytesIO(body)), name, most)
                if is_mnist and _sha256(array) != _FILES[name]:
                    raise ValueError("another file than MNIST's (by its SHA-256)")
                return body, array
            except (OSError, EOFError, zlib.error, http.client.HTTPException, ValueError) as error:
                reasons[source] = str(error) or repr(error)
                if getattr(error, 'code', None) in _REFUSALS:
                    urls.remove(source)
    tried = '; '.join(f'{source}: {reason}' for source, reason in reasons.items())
    raise OSError(f'{fault}, and could not be fetched from {tried}; put the file there by hand')


def _read_url(url, name, most):
    """The bytes at a URL, as many as its header and `most` allow; a terminal shows how many."""
    body = bytearray()
    on_terminal = sys.stderr is not None and sys.stderr.isatty()  # None: a program without one
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            size = int(response.headers['Content-Length'] or 0)
            while piece := response.read(1 << 16):
                body += piece
                if len(body) == 1 << 16 and name in _FILES:  # the first piece, and more to come
                    _, shape = _read_header(io.BufferedReader(io.BytesIO(body)), name, most)
                    most = min(most, len(body) + 2 * math.prod(shape))  # generous for gzip
                if len(body) > most:
                    raise ValueError(f'it sends more than {most:,} bytes')
                if on_terminal:
                    done = f'{len(body) / size:4.0%}' if size else f'{len(body):,} bytes'
                    print(f'\r{url} {done}', end='', file=sys.stderr, flush=True)
    finally:
        if on_terminal:
            print(file=sys.stderr)
    if size and len(body) != size:
        raise ConnectionError(f'cut off after {len(body):,} of {size} bytes')
    return body
