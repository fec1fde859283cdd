"""Draw a digit in the browser, and watch both networks learn to read it.

    python -m extras.draw    # http://127.0.0.1:8000/

Without a trained network, both learn while you draw. The convolutional one is
kept in the folder model, as `python mnist_deep.py --model_dir model` keeps it:
either of them goes on from what the other has saved. Once it is trained, the
page shows it, and a button starts a training from scratch, of which nothing is
kept. The page explains what the layers find in a drawing, and why softmax
regression sometimes takes it for something else. Only this machine can open it.
"""

import argparse
import contextlib
import copy
import functools
import http.server
import io
import json
import os
import re
import signal
import sys
import threading
import webbrowser

import numpy as np

if __name__ == '__main__':  # TensorFlow takes seconds to start: say so, and stop when asked to
    def stop(number, _):
        """Ends all at once: an exception would be lost, or crash a thread, within TensorFlow."""
        os.write(sys.stderr.fileno(), b'stopped\n')
        os._exit(128 + number)

    sys.stderr = sys.stderr or open(os.devnull, 'w')  # noqa: SIM115
    for ending in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(ending) != signal.SIG_IGN:  # as a shell's background jobs do
            signal.signal(ending, stop)
    print('starting TensorFlow ...', file=sys.stderr, flush=True)

import input_data
import mnist_deep
import model_dir
from extras.pictures import SeveralDigits, normalise, open_picture

tf = mnist_deep.tf

STEPS, SOFTMAX_STEPS = 20000, 1000  # the tutorial's, of the two trainings

# The tensors that the page shows: how many pictures each one is, how many pixels wide, and what the
# page says about them. Whatever a graph computes can be fetched by its name: that of the operation,
# whose scopes are those in `mnist_deep.deepnn`, and the number of its output.
LAYERS = {
    'conv1/Variable:0': (  # W_conv1
        32, 5, ('First convolutional layer: 32 features, each from a patch of 5x5 pixels, found '
                'by these 32 filters')),
    'conv1/Relu:0': (32, 28, 'Where it finds them'),
    'pool1/MaxPool:0': (32, 14, 'Pooling: the largest value of each 2x2 block is kept'),
    'conv2/Relu:0': (
        64, 14, 'Second convolutional layer: 64 features of those 32, each from a patch of 5x5'),
    'pool2/MaxPool:0': (64, 7, 'Pooling once more: 7x7 places are left')}
FILTERS, *FEATURES = LAYERS


class Networks:
    """The tutorial's two models in one session; while a thread trains them, others ask.

    Args:
        mnist: data sets of `input_data.read_data_sets`, with one-hot labels.
        folder: path of a trained convolutional network's checkpoints; None: a new network.
        seed: of a new network's weights and of its dropout, a whole number or None.

    Attributes:
        thread: the threading.Thread that trains a new network, once it is started.

    Raises:
        OSError: the folder's checkpoints may not be read.
        ValueError: they are damaged, or of another network.
    """

    def __init__(self, mnist, folder=None, seed=None):
        # Copies: each training has an order of minibatches of its own, from the seed on.
        self.train_set, self.softmax_train_set = (copy.deepcopy(mnist.train) for _ in range(2))
        self.test_set, self.finished = mnist.test, folder is not None
        with tf.Graph().as_default():
            self.sess = tf.Session()
            tf.set_random_seed(seed)
            self.x = tf.placeholder(tf.float32, shape=[None, 784])
            self.y_ = tf.placeholder(tf.float32, shape=[None, 10])

            # The convolutional network, as in mnist_deep.py
            y_conv, self.keep_prob = mnist_deep.deepnn(self.x)
            if self.finished:
                with self.sess.as_default():
                    model_dir.restore_newest(folder)
            else:
                with tf.name_scope('loss'):
                    cross_entropy = tf.reduce_mean(
                        tf.nn.softmax_cross_entropy_with_logits(labels=self.y_, logits=y_conv))
                with tf.name_scope('adam_optimizer'):
                    self.train_step = tf.train.AdamOptimizer(1e-4).minimize(
                        cross_entropy, global_step=tf.train.get_or_create_global_step())
                self.sess.run(tf.global_variables_initializer())

            # Softmax regression, as in mnist_softmax.py, but in local variables: a checkpoint has
            # the global ones, which are then those of mnist_deep.py
            self.W, b = (tf.Variable(tf.zeros(shape), collections=[tf.GraphKeys.LOCAL_VARIABLES])
                         for shape in ([784, 10], [10]))
            self.y = tf.matmul(self.x, self.W) + b
            cross_entropy = tf.reduce_mean(
                tf.nn.softmax_cross_entropy_with_logits(labels=self.y_, logits=self.y))
            self.train_softmax_step = tf.train.GradientDescentOptimizer(0.5).minimize(
                cross_entropy, var_list=[self.W, b])
            self.sess.run(tf.local_variables_initializer())

            # Both answers. Dropout, which would keep everything, is left out: its random numbers
            # are the training's, which --seed repeats whatever is asked meanwhile.
            h_fc1, W_fc2, b_fc2 = map(tf.get_default_graph().get_tensor_by_name,
                                      ('fc1/Relu:0', 'fc2/Variable:0', 'fc2/Variable_1:0'))
            both = [tf.matmul(h_fc1, W_fc2) + b_fc2, self.y]
            self.probabilities = [tf.nn.softmax(logits) for logits in both]
            self.correct_predictions = [tf.equal(tf.argmax(logits, 1), tf.argmax(self.y_, 1))
                                        for logits in both]

        # The training
        self.start = self.step = 0
        self.steps, self.accuracies = range(STEPS), []  # those of both, each 50 steps
        self.thread = threading.Thread(target=self.learn, daemon=True)
        self.stopping = None  # the exception that is to end it
        self.fault = self.unsaved = None  # the errors of a save, and of the last one of all
        self.kept, self.keeping = None, contextlib.ExitStack()  # its model_dir.ModelDir, to be left

    def keep(self, flags):
        """Goes on from what --model_dir has, and keeps there what is learned from now on.

        If it cannot be kept, as another training uses the folder, `fault` says so.

        Args:
            flags: those of `mnist_deep.py`.

        Raises:
            ValueError: the folder's checkpoints are damaged or of another network, or it holds
                something else.
        """
        with self.sess.graph.as_default(), self.sess.as_default():
            try:
                with contextlib.ExitStack() as keeping:
                    kept = keeping.enter_context(model_dir.ModelDir(flags))
                    self.steps = kept.resume(self.train_set)
                    self.kept, self.keeping = kept, keeping.pop_all()
                    self.start = kept.checkpoints.last_step
            except OSError as error:
                self.note(error)
                if model_dir.checkpoints(flags.model_dir):
                    model_dir.restore_newest(flags.model_dir)
                    self.start = int(tf.train.get_global_step().eval())
                self.steps = range(self.start, STEPS)
        self.step = self.start

    def learn(self):
        """What the thread does: the training, and saving its last step, whatever ends it."""
        with self.sess.graph.as_default(), self.sess.as_default():
            try:
                with self.keeping:
                    self.train()
            except KeyboardInterrupt:  # of `stop`
                pass
            except (OSError, ValueError) as error:
                self.unsaved = error
                self.note(error)

    def train(self):
        """The tutorial's two trainings, side by side."""
        steps = self.steps
        while True:
            try:
                for self.step in steps:
                    self.train_once()
                break
            except OSError as error:  # it cannot be saved, but perhaps the next time
                self.note(error)
                self.kept.events.fault = None
                steps = self.kept.steps(self.step + 1)
        self.step = STEPS
        self.test()

    def train_once(self):
        """One step of both."""
        if self.stopping:
            raise self.stopping
        if self.kept and self.step == self.kept.checkpoints.last_step:
            self.fault = None  # it has been saved again
        if self.step % 50 == 0:
            self.test()
        if self.step - self.start < SOFTMAX_STEPS:
            self.train_softmax(1)
        batch = self.train_set.next_batch(50)
        self.sess.run(self.train_step, {
            self.x: batch[0], self.y_: batch[1], self.keep_prob: 0.5})

    def stop(self, exception):
        """Ends the training, by a KeyboardInterrupt in its thread, which then says what is kept.

        OSError, ValueError: its last step cannot be saved.
        """
        self.stopping = exception
        if self.thread.is_alive():
            self.thread.join()
            if self.unsaved:
                raise self.unsaved

    def note(self, error):
        """Says, once, what went wrong."""
        if str(error) != str(self.fault):
            say(error)
        self.fault = error

    def train_softmax(self, steps=SOFTMAX_STEPS):
        """Trains softmax regression alone."""
        for _ in range(steps):
            batch = self.softmax_train_set.next_batch(100)
            self.sess.run(self.train_softmax_step, {self.x: batch[0], self.y_: batch[1]})

    def test(self):
        """Notes the accuracies of both on each tenth of the 10,000 test images."""
        images, labels = self.test_set.images[::10], self.test_set.labels[::10]
        correct = [self.sess.run(self.correct_predictions, {
            self.x: images[i:i + 100], self.y_: labels[i:i + 100]})
            for i in range(0, len(images), 100)]
        self.accuracies.append(np.mean(correct, (0, 2)).tolist())

    def look(self, image):
        """What the page shows of an image, float32 [784] in [0, 1]: a dict that JSON can hold."""
        (deep, softmax), y, W, features = self.sess.run(
            [self.probabilities, self.y, self.W, FEATURES], {self.x: [image]})
        evidence = (W.T * image).reshape(10, 28, 28)  # for each digit, or against it
        limit = np.abs(evidence).max() / 2  # a few pixels are far stronger than the others
        return {
            'deep': deep[0].tolist(), 'softmax': softmax[0].tolist(),
            'image': levels(image.reshape(28, 28)),
            # The features [height, width, n] of a layer, each on a scale of its own
            'layers': {name: levels(layer[0], (0, 1)) for name, layer in zip(FEATURES, features)},
            'strongest': {name: layer.max((0, 1, 2)).tolist()
                          for name, layer in zip(FEATURES, features)},
            'evidence': levels(evidence.clip(-limit, limit)), 'sums': y[0].tolist()}

    def state(self):
        """How far the training is, as a dict that JSON can hold."""
        filters = self.sess.run(FILTERS)
        return {'finished': self.finished, 'training': self.thread.is_alive(),
                'start': self.start, 'step': self.step, 'steps': STEPS,
                'kept': self.kept and self.kept.folder, 'fault': self.fault and str(self.fault),
                'accuracies': self.accuracies, 'filters': levels(filters[:, :, 0], (0, 1))}


def levels(values, axes=None):
    """An array as nested lists of whole numbers up to 255 or, if it is negative, from -255.

    Each picture, which has these axes, gets a scale of its own; without `axes`, all have one.
    """
    scale = np.abs(values).max(axes, keepdims=True)
    scaled = np.round(255 / np.where(scale, scale, 1) * values).astype(int)
    return (scaled if axes is None else np.moveaxis(scaled, axes, (-2, -1))).tolist()


def find_image(file):
    """What the networks are to see of a picture, and what is to be said about it.

    Args:
        file: binary file that is open for reading.

    Returns:
        image: float32 array [784] in [0, 1]; None: there is no digit.
        message: str; None: nothing is to be said.

    Raises:
        ValueError: it is no picture, is damaged, or is too large.
    """
    picture = open_picture(file)
    try:
        image = normalise(picture)
    except SeveralDigits as several:
        return several.image, str(several)
    except ValueError as nothing:
        return None, str(nothing)
    if is_unlike_mnist(image):
        return image, ("this may not be a digit: it has more ink and bends than MNIST's digits "
                       'have')
    return image, None


def is_unlike_mnist(image):
    """Whether an image, float32 [784], is as black and as winding as hardly any of MNIST's.

    Thick strokes are black, and thin ones that wind have a long outline. Both at once, as in a
    scribble, are found in 23 of MNIST's 70,000 digits.
    """
    pixels = image.reshape(28, 28)
    outline = np.abs(np.diff(pixels, axis=0)).sum() + np.abs(np.diff(pixels, axis=1)).sum()
    return bool(pixels.sum() * outline > 30000)


def main(argv=None):
    """Serves the page until Ctrl-C; `argv` is a list of flags, the command line's if None.

    Raises:
        OSError: the port is taken, the data cannot be had, or the last step not be saved.
        ValueError: the network in --model_dir cannot be restored.
        KeyboardInterrupt: a signal has ended it; it says what is kept.
    """
    flags = parse_flags(argv)
    with Server(flags.port, flags.allow_host) as server:
        say('reading MNIST ...')
        mnist = input_data.read_data_sets(flags.data_dir, one_hot=True, seed=flags.seed)
        server.new_networks = functools.partial(Networks, mnist, seed=flags.seed)
        newest = next(iter(model_dir.checkpoints(flags.model_dir)), None)
        if newest and model_dir.steps_of(newest) >= STEPS:
            say(f'restoring the network in {flags.model_dir}, training softmax regression ...')
            server.trained = server.shown = server.new_networks(flags.model_dir)
            server.trained.train_softmax()
        else:
            server.shown = server.new_networks()
            server.shown.keep(training_flags(flags))
            say('both networks learn while you draw; ' + (
                f'the convolutional one is kept in {flags.model_dir}' if server.shown.kept
                else 'nothing is kept'))
        address = f'http://127.0.0.1:{server.server_port}/'
        print(address, flush=True)
        if not flags.no_browser and has_display():
            threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
        with model_dir.signals_held_back() as server.signals:
            try:
                if not server.trained:
                    server.shown.thread.start()
                server.serve_forever(0.1)
            except model_dir.Stopped as stopped:
                server.shown.stop(stopped)
                raise


# The tutorial ends here. The rest is the server and the flags.

MAX_REQUEST = 20_000_000  # of a picture that is sent
HERE = os.path.dirname(os.path.realpath(__file__))
FILES = {'/': ('draw.html', 'text/html'), '/draw.css': ('draw.css', 'text/css'),
         '/draw.js': ('draw.js', 'text/javascript')}

# The page may run its own script, have its own style and ask this server: nothing else.
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
          "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class Server(http.server.ThreadingHTTPServer):
    """Listens on 127.0.0.1 alone. All pages are shown the same networks.

    Args:
        port: number of the port, 0 for any that is free.
        allowed_hosts: names, and ports if need be, under which a proxy shows the page.

    Attributes:
        new_networks: function, makes `Networks`.
        trained: the restored `Networks`, None if there are none.
        shown: those that answer: `trained`, or others that learn or have learned.
        signals: the numbers of those that have come: the first one ends `serve_forever`.
    """

    request_queue_size = 100
    new_networks = trained = shown = None
    signals = ()

    def __init__(self, port, allowed_hosts=()):
        self.changing, self.unpacking = threading.Lock(), threading.Lock()
        try:
            super().__init__(('127.0.0.1', port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, 'strerror', error)
            raise OSError(f'--port {port}: {reason}; name another one') from None
        self.hosts = [*own_hosts(self.server_port), *allowed_hosts]
        self.origins = [f'{scheme}://{name}' for scheme in ('http', 'https')
                        for name in allowed_hosts]
        self.files = {'/layers.js': ('text/javascript; charset=utf-8',
                                     f'const LAYERS = {json.dumps(LAYERS)};\n'.encode())}
        for path, (name, kind) in FILES.items():
            with open(os.path.join(HERE, name), 'rb') as f:
                self.files[path] = f'{kind}; charset=utf-8', f.read()

    def service_actions(self):
        if self.signals:
            raise model_dir.Stopped(self.signals[0])

    def learn(self):
        """Begins a training from scratch, unless one is shown already."""
        with self.changing:
            if self.shown is self.trained:
                networks = self.new_networks()
                networks.thread.start()
                self.shown = networks

    def back(self):
        """Ends that training, and shows the trained network again, if there is one."""
        with self.changing:
            if self.trained:
                self.shown.stop(KeyboardInterrupt())
                self.shown = self.trained

    def state(self):
        """What `Networks.state` says, and whether there is a trained network to go back to."""
        return {**self.shown.state(), 'trained': self.trained is not None}

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that has gone
            super().handle_error(request, client_address)


def own_hosts(port):
    """What the Host of a request to this machine's port says."""
    names = ['127.0.0.1', 'localhost', '[::1]']
    return [f'{name}:{port}' for name in names] + (names if port == 80 else [])  # HTTP's own port


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a request of the page."""

    timeout = 10  # seconds that a client may be silent

    def do_GET(self):
        """/ is the page, to which the other files belong; /state is the training's."""
        if not self.is_allowed():
            return
        path, *_ = self.path.split('?')  # a proxy's login may add a query
        if path in self.server.files:
            self.answer(200, *self.server.files[path])
        elif path == '/state':
            self.answer_json(200, self.server.state())
        else:
            self.refuse(404)

    def do_POST(self):
        """/read reads the picture that is sent; /learn begins a training, /back ends it."""
        if not self.is_allowed():
            return
        if self.path == '/read':
            self.read()
        elif self.path in ('/learn', '/back'):
            {'/learn': self.server.learn, '/back': self.server.back}[self.path]()
            self.answer_json(200, self.server.state())
        else:
            self.refuse(404)

    def read(self):
        """Answers what the networks say to a picture."""
        length = self.headers['Content-Length'] or ''
        if not length.isdecimal():
            return self.refuse(411)
        if len(length) > 15 or int(length) > MAX_REQUEST:
            return self.refuse(413, f'more than {MAX_REQUEST:,} bytes: make the picture smaller')
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            return self.refuse(408)
        networks = self.server.shown
        try:
            with self.server.unpacking:
                image, message = find_image(io.BytesIO(body))
        except ValueError as error:
            status, found = 422, {'message': str(error)}
        else:
            status = 200  # a readable picture, even without a digit
            found = {} if image is None else networks.look(image)
            if message:
                found['message'] = message
        self.answer_json(status, {**found, 'state': self.server.state()})

    def is_allowed(self):
        """Whether the page has sent this; one of another site has another host or origin."""
        host, origin = self.headers['Host'], self.headers['Origin']
        if host in self.server.hosts and origin in (None, f'http://{host}', *self.server.origins):
            return True
        port = self.server.server_port
        name = host if host not in self.server.hosts else origin.partition('://')[2]
        self.refuse(403, f'This server answers only its own page, not one of {name or "no name"}.',
                    f'Open http://127.0.0.1:{port}/ instead. If you forward the port, use the same '
                    f'number on your machine: ssh -L {port}:127.0.0.1:{port} HOST\n'
                    'If a proxy that you trust, such as JupyterHub, shows you the page under a '
                    'name of its own, start extras.draw with --allow_host and that name.')
        return False

    def refuse(self, status, message=None, advice=''):
        """Says why in the body, as HTTP/2 has no other place for it, then reads what is still
        sent, or the client might not see the answer.
        """
        message = message or http.HTTPStatus(status).phrase
        self.answer(status, 'text/plain; charset=utf-8', f'{message}\n{advice}'.encode())
        self.connection.settimeout(1)
        with contextlib.suppress(OSError):
            for _ in range(2000):
                if not self.rfile.read1(1 << 16):
                    break

    def answer_json(self, status, found):
        """Sends what JSON can hold."""
        self.answer(status, 'application/json', json.dumps(found, separators=(',', ':')).encode())

    def answer(self, status, kind, body):
        """Sends an answer."""
        self.send_response(status)
        for header in (('Content-Type', kind), ('Content-Length', str(len(body))),
                       ('Content-Security-Policy', POLICY),
                       ('X-Content-Type-Options', 'nosniff'), ('Cache-Control', 'no-store')):
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Nothing on the screen."""


def has_display():
    """Whether a browser has a window to open, or the user has named one that needs none."""
    return sys.platform in ('win32', 'darwin') or any(
        os.environ.get(name) for name in ('DISPLAY', 'WAYLAND_DISPLAY', 'BROWSER'))


def say(what):
    """Tells the user what is being done; standard output has the address alone."""
    print(what, file=sys.stderr, flush=True)


def parse_flags(argv):
    """The command line's flags."""
    parser = argparse.ArgumentParser(usage='python -m extras.draw [flags]', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model_dir', default='model', type=os.path.expanduser, metavar='FOLDER',
                        help='folder to keep the network in and to resume from (default: '
                        '%(default)s)')
    parser.add_argument('--data_dir', default=mnist_deep.flag_parser('').get_default('data_dir'),
                        metavar='FOLDER', help='where the MNIST files are; missing ones are '
                        'downloaded (default: %(default)s)')
    parser.add_argument('--port', type=int, default=8000, metavar='N',
                        help='port of the page (default: %(default)s)')
    parser.add_argument('--allow_host', action='append', default=[], type=host_name, metavar='NAME',
                        help='a name under which a proxy shows the page, such as hub.example.org; '
                        'may be repeated')
    parser.add_argument('--no_browser', action='store_true', help='do not open a browser')
    parser.add_argument('--seed', type=int, metavar='N',
                        help='a whole number that makes the training repeatable')
    return parser.parse_args(argv)


def training_flags(flags):
    """The flags of `mnist_deep.py` for the training in --model_dir: the tutorial's."""
    training = mnist_deep.flag_parser('').parse_args([])
    training.model_dir, training.seed, training.max_steps = flags.model_dir, flags.seed, STEPS
    return training


def host_name(name):
    """The Host of --allow_host, as a browser sends it."""
    if not re.fullmatch(r'[\w.-]+(:\d+)?', name):
        raise argparse.ArgumentTypeError(
            f'{name!r}, expected a name from the address bar, such as hub.example.org or '
            'hub.example.org:8443, without https:// and without a path')
    return name.lower()


if __name__ == '__main__':
    code = mnist_deep.run(main)
    os._exit(code)  # at once: in threads that still answer, within TensorFlow, an end is a crash
