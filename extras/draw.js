'use strict';
const byId = id => document.getElementById(id);
let drawing = null;  // what is asked about: the paper, a picture file, or null
let found = {};  // what the networks say to it
let notice = '';  // what is said in place of that, until something is drawn
let state = null;  // the training's

// Drawing, with a pen as wide as MNIST's strokes are in their images.
const paper = byId('paper'), hint = byId('hint'), undoing = byId('undo');
const pen = paper.getContext('2d', {willReadFrequently: true});
pen.lineWidth = 40;
pen.lineCap = pen.lineJoin = 'round';
const strokes = [];  // of the drawing, each a list of its points
let drawer = null;  // the id of the pointer that draws the last of them, while it does

paper.onpointerdown = event => {
  if (event.button || drawer !== null) return;  // one pointer draws, with its main button
  if (drawing !== paper) clear();  // of a picture, if there is one
  notice = '';
  hint.hidden = true;
  undoing.disabled = false;
  drawer = event.pointerId;
  paper.setPointerCapture(drawer);
  strokes.push([]);
  goOn(event);
};
paper.onpointermove = event => {
  if (event.pointerId !== drawer) return;
  const moves = event.getCoalescedEvents?.() ?? [];  // which not all browsers have, or fill
  (moves.length ? moves : [event]).forEach(goOn);
};
paper.onpointerup = paper.onpointercancel = event => {
  if (event.pointerId === drawer) drawer = null;
};

function goOn({clientX, clientY}) {
  const stroke = strokes[strokes.length - 1];
  const box = paper.getBoundingClientRect(), scale = paper.width / box.width;
  stroke.push([(clientX - box.left) * scale, (clientY - box.top) * scale]);
  paintPoint(stroke, stroke.length - 1);
  ask(paper);
}

function paintPoint(stroke, number) {  // the first one is a dot
  pen.beginPath();
  pen.moveTo(...stroke[Math.max(0, number - 1)]);
  pen.lineTo(...stroke[number]);
  pen.stroke();
}

function undo() {
  strokes.pop();
  drawer = null;
  notice = '';
  if (!strokes.length) return clear();
  whiten();
  strokes.forEach(stroke => stroke.forEach((_, number) => paintPoint(stroke, number)));
  ask(paper);
}

function clear() {
  strokes.length = 0;
  drawer = null;
  notice = '';
  undoing.disabled = true;
  hint.hidden = false;
  paper.classList.remove('photo');
  whiten();
  ask(null);
  show({});
}

function whiten() {
  pen.fillStyle = '#fff';
  pen.fillRect(0, 0, paper.width, paper.height);
}

undoing.onclick = undo;
byId('clear').onclick = clear;
onkeydown = event => {
  if (event.key === 'Escape') clear();
  if (event.key === 'z' && (event.ctrlKey || event.metaKey) && strokes.length) {
    event.preventDefault();
    undo();
  }
};

// Picture files: they are shown on the paper, and sent as they are.
async function askFile(files) {
  if (files.length !== 1) {
    return notify(files.length ? `${files.length} files at once: give one of them`
      : 'there is no picture file in it: save the picture, and give that file');
  }
  const [picture] = files;
  if (!await picture.slice(0, 1).arrayBuffer().catch(() => null)) {
    return notify(`${picture.name} cannot be read: is it a folder?`);
  }
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

const file = byId('file');
byId('choose').onclick = () => file.click();
file.onchange = () => {
  if (file.files.length) askFile(file.files);
  file.value = '';
};
document.onpaste = event => askFile(event.clipboardData.files);
ondragover = event => event.preventDefault();  // or else the browser itself opens the file
ondrop = event => { event.preventDefault(); askFile(event.dataTransfer.files); };

// The training: as long as it goes on, what is drawn is read again and again.
const training = byId('training'), note = byId('note'), curve = byId('curve');
const learn = byId('learn'), back = byId('back');
let timer = null;

async function poll() {
  timer = null;
  await (found.deep ? ask(drawing) : send('state'));
  if (state?.training) timer ??= setTimeout(poll, 500);
}

learn.onclick = () => send('learn', {method: 'POST'}).then(poll);
back.onclick = () => send('back', {method: 'POST'}).then(poll);
onfocus = () => { timer ??= setTimeout(poll, 0); };  // another page may have begun a training

// Asking: one question at most is under way, and the newest drawing is the next one.
let asking = false, next = null, cleared = 0;
const NOISE = 'against fingerprinting, this browser gives the page noise in place of your drawing: '
  + 'allow it to use canvas data, or read a picture file';

async function ask(picture) {
  next = drawing = picture;
  if (!picture) cleared += 1;
  if (asking) return;
  asking = true;
  answers.setAttribute('aria-busy', true);
  while (next) {
    const before = cleared, asked = next;
    next = null;  // a stroke that comes from here on is the next question
    const answer = asked === paper && !canRead() ? {message: NOISE} : await askServer(asked);
    if (before === cleared) show(answer);
  }
  asking = false;
  answers.setAttribute('aria-busy', false);
}

async function askServer(picture) {
  const body = picture === paper ? await new Promise(r => paper.toBlob(r)) : picture;
  return send('read', {method: 'POST', body});
}

function canRead() {  // whether black and white, painted on a canvas, come back as that
  const test = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  test.fillStyle = '#fff';
  test.fillRect(0, 0, 16, 16);
  test.fillStyle = '#000';
  test.fillRect(0, 0, 8, 16);
  return test.getImageData(0, 0, 16, 16).data.every((level, i) =>
    Math.abs(level - (i % 4 === 3 || i % 64 >= 32 ? 255 : 0)) < 16);  // some change it a little
}

async function send(path, options) {
  let answer;
  try {
    const response = await fetch(path, options), kind = response.headers.get('Content-Type');
    const body = await response.text();
    answer = kind?.startsWith('text/plain') ? {message: body} : JSON.parse(body);
  } catch {  // no answer, or one of a proxy between
    state = null;  // there is nothing to wait for
    training.textContent = '';
    answer = {message: 'no answer: is extras.draw still running?'};
  }
  const now = answer.state ?? (answer.steps ? answer : null);
  if (now) showState(now);
  else message.textContent = answer.message;
  return answer;
}

// The page is whole from the start, so that nothing moves when something is drawn.
const MODELS = {deep: 'convolutional network', softmax: 'softmax regression'};
const [[FILTERS], ...FEATURES] = Object.entries(LAYERS);  // the server's
const layers = byId('layers'), bars = byId('bars'), evidence = byId('evidence');

for (const [tensor, [count, , heading]] of Object.entries(LAYERS)) {
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

// Painting on its canvases.
let colours;  // the theme's

function takeColours() {
  colours = Object.fromEntries(['text', 'deep', 'for', 'against'].map(key => [
    key, getComputedStyle(document.querySelector(`.${key}`)).color.match(/\d+/g).map(Number)]));
  show(found);
  if (state) showState(state);
}

const blank = side => Array(side).fill(Array(side).fill(0));

function paint(canvas, rows, positive, negative) {  // a square of levels from -255 to 255
  const side = canvas.width = canvas.height = rows.length, pixels = new ImageData(side, side);
  rows.flat().forEach((level, i) =>
    pixels.data.set([...level < 0 ? negative : positive, Math.abs(level)], 4 * i));
  canvas.getContext('2d').putImageData(pixels, 0, 0);
}

function paintTiles(tensor, tiles, ...colours) {
  const {children} = byId(tensor);
  tiles.forEach((rows, number) => paint(children[number], rows, ...colours));
}

// A tile of a layer, large. One of a layer's tiles is a stop of Tab; the arrow keys go on from it.
const large = byId('large'), filter = byId('filter');
let chosen = byId(FEATURES[0][0]).firstChild;

function enlarge(tile = chosen) {
  chosen.classList.remove('chosen');
  chosen = tile;
  chosen.classList.add('chosen');
  const {id: tensor, children: tiles} = tile.parentNode, number = [...tiles].indexOf(tile);
  large.width = large.height = tile.width;
  large.getContext('2d').drawImage(tile, 0, 0);
  const strongest = found.strongest?.[tensor]?.[number];
  byId('name').textContent = tile.getAttribute('aria-label')
    + (strongest === undefined ? '' : `: strongest value ${strongest.toFixed(2)}`);
  const filters = byId(FILTERS).children;  // the first layer and its pooling have a feature of each
  filter.hidden = tensor === FILTERS || tiles.length !== filters.length;
  if (filter.hidden) return;
  filter.width = filter.height = filters[number].width;
  filter.getContext('2d').drawImage(filters[number], 0, 0);
}

layers.onpointermove = ({target}) => {  // not when the page is scrolled below a pointer at rest
  if (target.matches('canvas') && target !== chosen) enlarge(target);
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

// Showing how far the training is.
const counted = number => number.toLocaleString('en');

function showState(now) {
  const {step, steps, accuracies, finished, trained, filters} = state = now;
  const newest = accuracies[accuracies.length - 1];
  training.textContent = now.training ? `step ${counted(step)} of ${counted(steps)}`
    + (newest ? `, test accuracy ${Math.floor(100 * newest[0])} %` : '') : '';
  note.textContent = `${whatItIs(now)} ${whatIsKept(now)}`;
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
  enlarge();
}

function whatItIs({finished, training, start, step}) {
  if (finished) {
    return 'The convolutional network has been trained before. You can also watch both networks '
      + 'learn from scratch, while you draw.';
  }
  if (!training) return `The training is over, after ${counted(step)} steps.`;
  const who = start ? `The convolutional network goes on from step ${counted(start)}, softmax `
    + 'regression begins' : 'Both begin';
  return `${who} knowing nothing. Draw a digit, and see when they begin to read it. The training `
    + 'goes on even if you close the page.';
}

function whatIsKept({finished, kept, fault}) {
  if (finished) return 'Nothing of that is kept.';
  if (!kept) return fault ? `Nothing of it is kept: ${fault}.` : 'Nothing of it is kept.';
  return fault ? `${fault}.` : `The convolutional network is kept in the folder ${kept}.`;
}

// Showing what the networks say.
const answers = byId('answers'), sign = byId('sign'), message = byId('message');

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
  message.textContent = notice || (found.message ?? (
    deep === '' ? 'Both answer as soon as there is ink on the paper.'
    : deep === softmax ? 'They agree.'
    : state?.training ? 'They differ.'
    : 'They differ: one weighs pixels, one finds parts. See below.'));
  paint(byId('image'), found.image ?? blank(28), colours.text);
  for (const [tensor, [count, side]] of FEATURES) {
    paintTiles(tensor, found.layers?.[tensor] ?? Array(count).fill(blank(side)), colours.deep);
  }
  evidence.querySelectorAll('figure').forEach((figure, digit) => {
    const sum = found.sums?.[digit];
    paint(figure.firstChild, found.evidence?.[digit] ?? blank(28), colours.for, colours.against);
    figure.lastChild.innerHTML = `<b>${digit}</b> ${sum === undefined ? '' : signed(sum)}`;
    figure.classList.toggle('winner', digit === softmax);
  });
  enlarge();
}

const signed = number => (number < 0 ? '−' : '+') + Math.abs(number).toFixed(1);

function notify(text) {
  notice = text;
  show(found);
}

for (const kind of ['prefers-color-scheme: dark', 'forced-colors: active']) {
  matchMedia(`(${kind})`).onchange = takeColours;
}
takeColours();
clear();
poll();
