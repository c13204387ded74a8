// The page: a picture to draw or to drop, the network's classes for it, and what is known of the network.

const facts = JSON.parse(document.getElementById("facts").textContent);
const form = facts.input, SHOWN = 5, TOLERANCE = 1e-4;
const byId = (id) => document.getElementById(id);
const picture = byId("picture"), brush = picture.getContext("2d", { willReadFrequently: true });
let network = null;

function alarm(text) {
  byId("alarm").textContent = text;
  byId("alarm").hidden = !text;
}

function row(name, text) {
  const line = document.createElement("tr");
  for (const [kind, content] of [["th", name], ["td", text]]) {
    const cell = document.createElement(kind);
    cell.textContent = content;
    line.append(cell);
  }
  byId("figures").append(line);
  return line.lastChild;
}

// ---- classes

function softmax(scores) {
  const largest = Math.max(...scores), powers = Array.from(scores, (score) => Math.exp(score - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

function showClasses(scores) {
  const shares = softmax(scores);
  const order = shares.map((_, i) => i).sort((a, b) => shares[b] - shares[a]).slice(0, SHOWN);
  byId("classes").replaceChildren(...order.map((i) => {
    const item = document.createElement("li");
    for (const [kind, text] of [["name", facts.classes[i] || `class ${i}`], ["share", percent(shares[i])]]) {
      const part = document.createElement("span");
      part.className = kind;
      part.textContent = text;
      item.append(part);
    }
    const trough = document.createElement("div"), fill = document.createElement("div");
    trough.className = "trough";
    fill.className = "fill";
    fill.style.width = `${100 * shares[i]}%`;
    trough.append(fill);
    item.append(trough);
    return item;
  }));
}

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

function infer(image) {
  if (!network || !image) return;
  try {
    const { output, milliseconds } = network.run(prepared(image, form));
    showClasses(output);
    byId("time").textContent = `${milliseconds.toFixed(milliseconds < 10 ? 2 : 0)} ms on this device, one thread`;
    byId("idle").hidden = true;
    alarm("");
  } catch (error) {
    // Where the runtime has ended in the middle of a run, its memory is in no state to go on from.
    if (error instanceof WebAssembly.RuntimeError) network = null;
    alarm(`The network did not run: ${error.message}${network ? "" : "; load the page again"}`);
  }
}

// ---- drawing

let pen = null, holdsFile = false;

function wipe() {
  holdsFile = false;
  brush.fillStyle = "#000";
  brush.fillRect(0, 0, picture.width, picture.height);
  byId("hint").hidden = false;
  byId("classes").replaceChildren();
  byId("idle").hidden = false;
}

function place(event) {
  const box = picture.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * picture.width,
    ((event.clientY - box.top) / box.height) * picture.height];
}

function stroke(from, to) {
  brush.strokeStyle = "#fff";
  brush.lineCap = brush.lineJoin = "round";
  brush.lineWidth = picture.width / (facts.grain ? 7 : 11); // pens of coarse digits are broad
  brush.beginPath();
  brush.moveTo(...from);
  brush.lineTo(...to);
  brush.stroke();
}

function beginDrawing() {
  picture.classList.add("draws");
  picture.addEventListener("pointerdown", (event) => {
    if (holdsFile) wipe();
    byId("hint").hidden = true;
    picture.setPointerCapture(event.pointerId);
    pen = place(event);
    stroke(pen, pen);
  });
  picture.addEventListener("pointermove", (event) => {
    if (!pen) return;
    const next = place(event);
    stroke(pen, next);
    pen = next;
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    picture.addEventListener(kind, () => {
      if (!pen) return;
      pen = null;
      const drawing = centred(brush.getImageData(0, 0, picture.width, picture.height));
      infer(drawing && facts.grain ? coarse(drawing, facts.grain) : drawing);
    });
  }
}

// ---- image files

async function takeFile(file) {
  if (!file) return;
  let image = null;
  try {
    image = pixelsOf(await createImageBitmap(file));
  } catch {
    alarm(`${file.name} is not an image that this browser can read.`);
    return;
  }
  infer(image);
}

// Show a picture, and return all its pixels.
function pixelsOf(bitmap) {
  const whole = document.createElement("canvas");
  whole.width = bitmap.width;
  whole.height = bitmap.height;
  const context = whole.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff"; // behind what is transparent
  context.fillRect(0, 0, whole.width, whole.height);
  context.drawImage(bitmap, 0, 0);
  const image = context.getImageData(0, 0, whole.width, whole.height);
  show(whole);
  return image;
}

function show(whole) {
  const scale = Math.min(picture.width / whole.width, picture.height / whole.height);
  const [width, height] = [whole.width * scale, whole.height * scale];
  wipe();
  holdsFile = true;
  byId("hint").hidden = true;
  brush.drawImage(whole, (picture.width - width) / 2, (picture.height - height) / 2, width, height);
}

function listenForFiles() {
  byId("choose").addEventListener("change", (event) => {
    takeFile(event.target.files[0]);
    event.target.value = "";
  });
  const stage = byId("stage");
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    stage.classList.add("over");
  });
  document.addEventListener("dragleave", () => stage.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    stage.classList.remove("over");
    takeFile(event.dataTransfer.files[0]);
  });
}

// ---- the beginning

// The outputs for one input, made of numbers on both sides, stand in the page: this browser's must be those.
function compare() {
  const expected = new Float32Array(bytesOf(facts.expected).buffer);
  const { output } = network.run(noise(form.channels * form.height * form.width));
  const error = relativeError(output, expected);
  const text = `largest difference ${error.toExponential(1)} of the largest output`;
  row("compared with PyTorch", error <= TOLERANCE ? text : `not equal: ${text}`);
  if (!(error <= TOLERANCE)) alarm(`In this browser the network computes something else than it should: ${text}.`);
}

async function begin() {
  for (const [name, text] of facts.rows) row(name, text);
  wipe();
  if (facts.draw) beginDrawing();
  byId("clear").addEventListener("click", wipe);
  listenForFiles();
  try {
    const [runtime, file] = ["runtime", "network"].map((id) => bytesOf(byId(id).textContent.trim()));
    network = await Network.open(runtime, file);
    compare();
    document.documentElement.dataset.state = "ready";
  } catch (error) {
    alarm(`The network cannot be opened: ${error.message}`);
    document.documentElement.dataset.state = "failed";
  }
}

begin();
