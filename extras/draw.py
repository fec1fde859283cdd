"""Draw a digit in the browser, and watch both networks learn to read it.

    python -m extras.draw    # http://127.0.0.1:8000/

Without a trained network, both learn while you draw, and nothing of that is
kept. With one, which `python mnist_deep.py --model_dir model` trains in some
minutes, the page shows it, and a button starts a training from scratch. The
page explains what the layers find in a drawing, and why softmax regression
sometimes takes it for something else. Only this machine can open it.
"""

import argparse
import contextlib
import functools
import http.server
import io
import json
import os
import shlex
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

# The tensors that the page shows. Whatever a graph computes can be fetched by its name: that of the
# operation, whose scopes are those in `mnist_deep.deepnn`, and the number of its output.
LAYERS = ('conv1/Relu:0', 'pool1/MaxPool:0', 'conv2/Relu:0', 'pool2/MaxPool:0')
FILTERS = 'conv1/Variable:0'  # W_conv1


class Networks:
    """The tutorial's two models in one session; while a thread trains them, others ask.

    Args:
        mnist: data sets of `input_data.read_data_sets`, with one-hot labels.
        folder: path of a trained convolutional network's checkpoints; None: a new network.
        seed: of a new network's weights and of its dropout, a whole number or None.

    Raises:
        ValueError: the folder's checkpoints are damaged, or of another network.
    """

    def __init__(self, mnist, folder=None, seed=None):
        self.mnist, self.finished = mnist, folder is not None
        self.step, self.accuracies = 0, []  # those of both, each 50 steps
        with tf.Graph().as_default():
            self.sess = tf.Session()
            tf.set_random_seed(seed)
            self.x = tf.placeholder(tf.float32, shape=[None, 784])
            self.y_ = tf.placeholder(tf.float32, shape=[None, 10])

            # The convolutional network, as in mnist_deep.py
            y_conv, self.keep_prob = mnist_deep.deepnn(self.x)
            restored = []
            if self.finished:
                with self.sess.as_default():
                    model_dir.restore_newest(folder)
                restored = tf.global_variables()
            else:
                cross_entropy = tf.reduce_mean(
                    tf.nn.softmax_cross_entropy_with_logits(labels=self.y_, logits=y_conv))
                self.train_step = tf.train.AdamOptimizer(1e-4).minimize(cross_entropy)

            # Softmax regression, as in mnist_softmax.py
            self.W = tf.Variable(tf.zeros([784, 10]))
            b = tf.Variable(tf.zeros([10]))
            self.y = tf.matmul(self.x, self.W) + b
            cross_entropy = tf.reduce_mean(
                tf.nn.softmax_cross_entropy_with_logits(labels=self.y_, logits=self.y))
            self.train_softmax_step = tf.train.GradientDescentOptimizer(0.5).minimize(cross_entropy)

            self.probabilities = [tf.nn.softmax(y_conv), tf.nn.softmax(self.y)]
            self.correct_predictions = [tf.equal(tf.argmax(logits, 1), tf.argmax(self.y_, 1))
                                        for logits in (y_conv, self.y)]
            self.sess.run(tf.variables_initializer(
                [variable for variable in tf.global_variables() if variable not in restored]))
        self.filters = self.sess.run(FILTERS)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.train, daemon=True)

    def train(self):
        """The tutorial's two trainings, side by side."""
        for self.step in range(STEPS):
            if self.stopped.is_set():
                return
            if self.step % 50 == 0:
                self.test()
            if self.step < SOFTMAX_STEPS:
                self.train_softmax(1)
            batch = self.mnist.train.next_batch(50)
            self.filters, _ = self.sess.run([FILTERS, self.train_step], {
                self.x: batch[0], self.y_: batch[1], self.keep_prob: 0.5})
        self.step = STEPS
        self.test()

    def train_softmax(self, steps=SOFTMAX_STEPS):
        """Trains softmax regression alone."""
        for _ in range(steps):
            batch = self.mnist.train.next_batch(100)
            self.sess.run(self.train_softmax_step, {self.x: batch[0], self.y_: batch[1]})

    def test(self):
        """Notes the accuracies of both on each tenth of the 10,000 test images."""
        images, labels = self.mnist.test.images[::10], self.mnist.test.labels[::10]
        correct = [self.sess.run(self.correct_predictions, {
            self.x: images[i:i + 100], self.y_: labels[i:i + 100], self.keep_prob: 1.0})
            for i in range(0, len(images), 100)]
        self.accuracies.append(np.mean(correct, (0, 2)).tolist())

    def look(self, image):
        """What the page shows of an image, float32 [784] in [0, 1]: a dict that JSON can hold."""
        (deep, softmax), y, W, layers = self.sess.run(
            [self.probabilities, self.y, self.W, LAYERS], {self.x: [image], self.keep_prob: 1.0})
        evidence = (W.T * image).reshape(10, 28, 28)  # for each digit, or against it
        limit = np.abs(evidence).max() / 2  # a few pixels are far stronger than the others
        return {
            'deep': deep[0].tolist(), 'softmax': softmax[0].tolist(),
            'image': levels(image.reshape(28, 28)),
            # The features [height, width, n] of a layer, each on a scale of its own
            'layers': {name: levels(layer[0], (0, 1)) for name, layer in zip(LAYERS, layers)},
            'strongest': {name: layer.max((0, 1, 2)).tolist()
                          for name, layer in zip(LAYERS, layers)},
            'evidence': levels(evidence.clip(-limit, limit)), 'sums': y[0].tolist()}

    def state(self):
        """How far the training is, as a dict that JSON can hold."""
        return {'finished': self.finished, 'training': self.thread.is_alive(),
                'step': self.step, 'steps': STEPS, 'accuracies': self.accuracies,
                'filters': levels(self.filters[:, :, 0], (0, 1))}


def levels(values, axes=None):
    """An array as nested lists of whole numbers up to 255 or, if it is negative, from -255.

    Each picture, which has these axes, gets a scale of its own; without `axes`, all have one.
    """
    scale = np.abs(values).max(axes, keepdims=True)
    scaled = np.round(255 / np.where(scale, scale, 1) * values).astype(int)
    return (scaled if axes is None else np.moveaxis(scaled, axes, (-2, -1))).tolist()


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

    OSError, ValueError: the port is taken, the data cannot be had, or the network not be restored.
    """
    flags = parse_flags(argv)
    with Server(flags.port) as server:
        say('reading MNIST ...')
        mnist = input_data.read_data_sets(flags.data_dir, one_hot=True, seed=flags.seed)
        server.new_networks = functools.partial(Networks, mnist, seed=flags.seed)
        if model_dir.checkpoints(flags.model_dir):
            say(f'restoring the network in {flags.model_dir}, training softmax regression ...')
            server.trained = server.shown = server.new_networks(flags.model_dir)
            server.trained.train_softmax()
        else:
            say(f'no trained network in {flags.model_dir}: both networks learn while you draw, and '
                'nothing is kept;\nto keep one, run: python mnist_deep.py --model_dir '
                + shlex.quote(flags.model_dir))
            server.learn()
        address = f'http://127.0.0.1:{server.server_port}/'
        print(address, flush=True)
        if not flags.no_browser and has_display():
            threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
        server.serve_forever()


# The tutorial ends here. The rest is the server and the flags.

MAX_BYTES = 20_000_000  # of a picture that is sent
HERE = os.path.dirname(os.path.realpath(__file__))
FILES = {'/': ('draw.html', 'text/html'), '/draw.css': ('draw.css', 'text/css'),
         '/draw.js': ('draw.js', 'text/javascript')}

# The page may run its own script, have its own style and ask this server: nothing else.
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
          "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class Server(http.server.ThreadingHTTPServer):
    """Listens on 127.0.0.1 alone. All pages are shown the same networks.

    Attributes:
        new_networks: function, makes `Networks`.
        trained: the restored `Networks`, None if there are none.
        shown: those that answer: `trained`, or others that learn or have learned.
    """

    request_queue_size = 100
    new_networks = trained = shown = None

    def __init__(self, port):
        self.changing = threading.Lock()
        try:
            super().__init__(('127.0.0.1', port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, 'strerror', error)
            raise OSError(f'--port {port}: {reason}; name another one') from None
        self.hosts = [f'{name}:{self.server_port}' for name in ('127.0.0.1', 'localhost', '[::1]')]
        self.files = {}
        for path, (name, kind) in FILES.items():
            with open(os.path.join(HERE, name), 'rb') as f:
                self.files[path] = f'{kind}; charset=utf-8', f.read()

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
                self.shown.stopped.set()
                self.shown = self.trained

    def state(self):
        """What `Networks.state` says, and whether there is a trained network to go back to."""
        return {**self.shown.state(), 'trained': self.trained is not None}

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that has gone
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a request of the page."""

    timeout = 10  # seconds that a client may be silent

    def do_GET(self):
        """/ is the page, /draw.css and /draw.js belong to it; /state is the training's."""
        if not self.is_allowed():
            return
        if self.path in self.server.files:
            self.answer(200, *self.server.files[self.path])
        elif self.path == '/state':
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
        if len(length) > 15 or int(length) > MAX_BYTES:
            return self.refuse(413, f'more than {MAX_BYTES:,} bytes: make the picture smaller')
        status, found = 422, {}
        try:
            picture = open_picture(io.BytesIO(self.rfile.read(int(length))))
            status = 200  # a readable picture, even without a digit
            image = normalise(picture)
            if is_unlike_mnist(image):
                found['message'] = ('this may not be a digit: it has more ink and bends than '
                                    "MNIST's digits have")
        except TimeoutError:
            return self.refuse(408)
        except SeveralDigits as several:
            image, found['message'] = several.image, str(several)
        except ValueError as error:
            image, found['message'] = None, str(error)
        networks = self.server.shown
        if image is not None:
            found.update(networks.look(image))
        self.answer_json(status, {**found, 'state': self.server.state()})

    def is_allowed(self):
        """Whether the page has sent this; one of another site has another host or origin."""
        host, origin = self.headers['Host'], self.headers['Origin']
        if host in self.server.hosts and origin in (None, f'http://{host}'):
            return True
        port = self.server.server_port
        self.refuse(403, 'this server answers only its own page', 'Open '
                    f'http://127.0.0.1:{port}/ instead. If you forward the port, use the same '
                    f'number on your machine: ssh -L {port}:127.0.0.1:{port} HOST')
        return False

    def refuse(self, status, message=None, explanation=None):
        """Sends an error, then reads what is still sent, or the client might not see the error."""
        self.send_error(status, message, explanation)
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
                        help='folder of the trained network (default: %(default)s)')
    parser.add_argument('--data_dir', default=mnist_deep.flag_parser('').get_default('data_dir'),
                        metavar='FOLDER', help='where the MNIST files are; missing ones are '
                        'downloaded (default: %(default)s)')
    parser.add_argument('--port', type=int, default=8000, metavar='N',
                        help='port of the page (default: %(default)s)')
    parser.add_argument('--no_browser', action='store_true', help='do not open a browser')
    parser.add_argument('--seed', type=int, metavar='N',
                        help='a whole number that makes the training repeatable')
    return parser.parse_args(argv)


if __name__ == '__main__':
    sys.exit(mnist_deep.run(main))
