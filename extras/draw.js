'use strict';
const [paper, hint, file, answers, sign, message, bars, training, note, learn, back, curve, image,
  layers, large, filter, name, evidence] = [
  'paper', 'hint', 'file', 'answers', 'sign', 'message', 'bars', 'training', 'note', 'learn',
  'back', 'curve', 'image', 'layers', 'large', 'filter', 'name', 'evidence'].map(
  id => document.getElementById(id));
const MODELS = {deep: 'convolutional network', softmax: 'softmax regression'};
const FILTERS = 'conv1/Variable:0';
const LAYERS = [  // tensor, number and side of its tiles, heading
  [FILTERS, 32, 5, 'First convolutional layer: 32 features, each from a patch of 5x5 pixels, '
    + 'found by these 32 filters'],
  ['conv1/Relu:0', 32, 28, 'Where it finds them'],
  ['pool1/MaxPool:0', 32, 14, 'Pooling: the largest value of each 2x2 block is kept'],
  ['conv2/Relu:0', 64, 14,
    'Second convolutional layer: 64 features of those 32, each from a patch of 5x5'],
  ['pool2/MaxPool:0', 64, 7, 'Pooling once more: 7x7 places are left']];
let state = null;  // the training's
let found = {};  // what the networks say to the drawing

// Drawing, with a pen as wide as MNIST's strokes are in their images.
const pen = paper.getContext('2d', {willReadFrequently: true});
pen.lineWidth = 40;
pen.lineCap = pen.lineJoin = 'round';
let last = null;  // where the stroke under way has come to

function stroke({clientX, clientY}) {
  const box = paper.getBoundingClientRect(), scale = paper.width / box.width;
  const to = [(clientX - box.left) * scale, (clientY - box.top) * scale];
  pen.beginPath();
  pen.moveTo(...last ?? to);
  pen.lineTo(...to);
  pen.stroke();
  last = to;
  ask(paper);
}

paper.onpointerdown = event => {
  if (event.button || last) return;  // one pointer draws, with its main button
  if (drawing !== paper) clear();  // of a picture, if there is one
  hint.hidden = true;
  paper.setPointerCapture(event.pointerId);
  stroke(event);
};
paper.onpointermove = event => { if (last) event.getCoalescedEvents().forEach(stroke); };
paper.onpointerup = paper.onpointercancel = () => { last = null; };

function clear() {
  pen.fillStyle = '#fff';
  pen.fillRect(0, 0, paper.width, paper.height);
  paper.classList.remove('photo');
  hint.hidden = false;
  last = null;
  ask(null);
  show({});
}

document.getElementById('clear').onclick = clear;
onkeydown = event => { if (event.key === 'Escape') clear(); };

// Picture files: they are shown on the paper, and sent as they are.
async function askFile(picture) {
  if (!picture) return;
  clear();
  hint.hidden = true;
  ask(picture);
  const pixels = await createImageBitmap(picture).catch(() => null);  // some the server alone reads
  if (!pixels || drawing !== picture) return;
  const scale = paper.width / Math.max(pixels.width, pixels.height);
  const [width, height] = [pixels.width * scale, pixels.height * scale];
  paper.classList.add('photo');
  pen.drawImage(pixels, (paper.width - width) / 2, (paper.height - height) / 2, width, height);
}

document.getElementById('choose').onclick = () => file.click();
file.onchange = () => { askFile(file.files[0]); file.value = ''; };
document.onpaste = event => askFile(event.clipboardData.files[0]);
ondragover = event => event.preventDefault();  // or else the browser itself opens the file
ondrop = event => { event.preventDefault(); askFile(event.dataTransfer.files[0]); };

// Asking: one question at most is under way, and the newest drawing is the next one.
let asking = false, next = null, drawing = null, cleared = 0;

async function ask(picture) {  // the paper, a file, or null: nothing more
  next = drawing = picture;
  if (!picture) cleared += 1;
  if (asking) return;
  asking = true;
  while (next) {
    const before = cleared, asked = next;
    next = null;  // a stroke that comes from here on is the next question
    const body = asked === paper ? await new Promise(r => paper.toBlob(r)) : asked;
    const answer = await send('read', {method: 'POST', body});
    if (before === cleared) show(answer);
  }
  asking = false;
}

async function send(path, options) {
  const answer = await fetch(path, options).then(
    response => response.json().catch(() => ({message: response.statusText})),
    () => {
      state = null;  // there is nothing to wait for
      training.textContent = '';
      message.textContent = 'no answer: is extras.draw still running?';
      return {message: message.textContent};
    });
  const now = answer.state ?? (answer.steps ? answer : null);
  if (now) showState(now);
  return answer;
}

// The training: as long as it goes on, what is drawn is read again and again.
let timer = null;

async function poll() {
  timer = null;
  await (found.deep ? ask(drawing) : send('state'));
  if (state?.training) timer ??= setTimeout(poll, 500);
}

learn.onclick = () => send('learn', {method: 'POST'}).then(poll);
back.onclick = () => send('back', {method: 'POST'}).then(poll);
onfocus = () => { timer ??= setTimeout(poll, 0); };  // another page may have begun a training

// Showing how far the training is.
function showState(now) {
  const {step, steps, accuracies, finished, trained, filters} = state = now;
  const [number, all] = [step, steps].map(count => count.toLocaleString('en'));
  const newest = accuracies.at(-1);
  training.textContent = now.training ? `step ${number} of ${all}`
    + (newest ? `, test accuracy ${Math.floor(100 * newest[0])} %` : '') : '';
  note.textContent =
    finished ? 'The convolutional network has been trained before. You can also watch both '
      + 'networks learn from scratch, while you draw.'
    : now.training ? 'Both begin knowing nothing. Draw a digit, and see when they begin to read it. '
      + 'The training goes on even if you close the page; nothing of it is kept.'
    : `The training is over, after ${number} steps. Nothing of it is kept.`;
  learn.hidden = !finished;
  back.hidden = finished || !trained;
  curve.hidden = finished;
  const width = 300 / Math.max(10, accuracies.length - 1);
  Object.entries(MODELS).forEach(([model, label], i) => {
    curve.querySelector(`path.${model}`).setAttribute('d', accuracies.map((pair, x) =>
      `${x ? 'L' : 'M'}${(x * width).toFixed(1)} ${(505 - 500 * pair[i]).toFixed(1)}`).join(''));
    curve.querySelector(`span.${model}`).textContent =
      newest ? `${label} ${(100 * newest[i]).toFixed(1)} %` : label;
  });
  paintTiles(FILTERS, filters, colours.for, colours.against);
  enlarge(chosen);
}

// Showing what the networks say.
function show(answer) {
  found = answer;
  answers.classList.toggle('unsure', Boolean(found.message));
  const [deep, softmax] = Object.keys(MODELS).map(model => {
    const shares = found[model], winner = shares?.indexOf(Math.max(...shares)) ?? '';
    const output = answers.querySelector(`output.${model}`);
    if (output.textContent !== `${winner}`) output.textContent = winner;  // to be said once
    bars.querySelectorAll(`.${model}`).forEach((cell, digit) => {
      const share = 100 * (shares?.[digit] ?? 0);
      cell.querySelector('i').style.width = `${share}%`;
      cell.querySelector('.percent').textContent = shares ? `${share.toFixed(1)}%` : '';
      cell.classList.toggle('winner', digit === winner);
    });
    return winner;
  });
  sign.textContent = deep === '' ? '' : deep === softmax ? '=' : '≠';
  sign.title = deep === '' ? '' : deep === softmax ? 'they agree' : 'they differ';
  answers.classList.toggle('differ', deep !== softmax);
  message.textContent = found.message ?? (
    deep === '' ? 'Both answer as soon as there is ink on the paper.'
    : deep === softmax ? 'They agree.'
    : state?.training ? 'They differ.'
    : 'They differ: one weighs pixels, one finds parts. See below.');
  paint(image, found.image ?? blank(28), colours.text);
  for (const [tensor, count, side] of LAYERS.slice(1)) {
    paintTiles(tensor, found.layers?.[tensor] ?? Array(count).fill(blank(side)), colours.deep);
  }
  evidence.querySelectorAll('figure').forEach((figure, digit) => {
    const sum = found.sums?.[digit];
    paint(figure.firstChild, found.evidence?.[digit] ?? blank(28), colours.for, colours.against);
    figure.lastChild.innerHTML = `<b>${digit}</b> ${sum === undefined ? '' : signed(sum)}`;
    figure.classList.toggle('winner', digit === softmax);
  });
  enlarge(chosen);
}

const signed = number => (number < 0 ? '−' : '+') + Math.abs(number).toFixed(1);
const blank = side => Array(side).fill(Array(side).fill(0));

function paint(canvas, rows, positive, negative) {  // a square of levels from -255 to 255
  const side = canvas.width = canvas.height = rows.length, pixels = new ImageData(side, side);
  rows.flat().forEach((level, i) =>
    pixels.data.set([...level < 0 ? negative : positive, Math.abs(level)], 4 * i));
  canvas.getContext('2d').putImageData(pixels, 0, 0);
}

function paintTiles(tensor, tiles, ...colours) {
  const {children} = document.getElementById(tensor);
  tiles.forEach((rows, number) => paint(children[number], rows, ...colours));
}

// A tile of a layer, large. One of a layer's tiles is a stop of Tab; the arrow keys go on from it.
function enlarge(tile) {
  chosen.classList.remove('chosen');
  chosen = tile;
  chosen.classList.add('chosen');
  const tensor = tile.parentNode.id, number = [...tile.parentNode.children].indexOf(tile);
  large.width = large.height = tile.width;
  large.getContext('2d').drawImage(tile, 0, 0);
  const strongest = found.strongest?.[tensor]?.[number];
  name.textContent =
    tile.ariaLabel + (strongest === undefined ? '' : `: strongest value ${strongest.toFixed(2)}`);
  filter.hidden = !/^(conv1.Relu|pool1)/.test(tensor);
  filter.width = filter.height = 5;
  filter.getContext('2d').drawImage(document.getElementById(FILTERS).children[number % 32], 0, 0);
}

layers.onpointermove = ({target}) => {  // not when the page is scrolled below a pointer at rest
  if (target.role === 'img' && target !== chosen) enlarge(target);
};
layers.addEventListener('focusin', ({target}) => {
  target.parentNode.querySelector('[tabindex="0"]').tabIndex = -1;
  target.tabIndex = 0;
  enlarge(target);
});
layers.onkeydown = event => {
  const tiles = [...event.target.parentNode.children], here = tiles.indexOf(event.target);
  const row = tiles.filter(tile => tile.offsetTop === tiles[0].offsetTop).length;
  const to = {ArrowLeft: here - 1, ArrowRight: here + 1, ArrowUp: here - row, ArrowDown: here + row,
    Home: 0, End: tiles.length - 1}[event.key];
  if (to === undefined) return;
  event.preventDefault();
  tiles[to]?.focus();
};

// The page is whole from the start, so that nothing moves when something is drawn.
for (const [tensor, count, , heading] of LAYERS) {
  const kind = tensor === FILTERS ? 'filter' : 'feature';
  const tiles = Array.from({length: count}, (_, number) => `<canvas role="img" tabindex="${
    number ? -1 : 0}" aria-label="${tensor}, ${kind} ${number}"></canvas>`).join('');
  layers.insertAdjacentHTML('beforeend', `<h3>${heading} <code>${tensor}</code></h3>
    <div class="tiles" id="${tensor}" role="group" aria-label="${heading}">${tiles}</div>`);
}
for (let digit = 0; digit < 10; digit++) {
  const cell = '<div><span class="bar"><i></i></span><span class="percent"></span></div>';
  bars.insertRow().innerHTML =
    `<th scope="row">${digit}<td class="deep">${cell}<td class="softmax">${cell}`;
  evidence.insertAdjacentHTML('beforeend', `<figure><canvas role="img" aria-label="Evidence for ${
    digit}"></canvas><figcaption></figcaption></figure>`);
}
let chosen = document.getElementById('conv1/Relu:0').firstChild, colours;

function takeColours() {  // the theme's
  colours = Object.fromEntries(['text', 'deep', 'for', 'against'].map(key => [
    key, getComputedStyle(document.querySelector(`.${key}`)).color.match(/\d+/g).map(Number)]));
  show(found);
  if (state) showState(state);
}

matchMedia('(prefers-color-scheme: dark)').onchange = takeColours;
takeColours();
clear();
poll();
