// The runtime in WebAssembly, through its C interface (growfx.h): one network of one input and one output.
"use strict";

const MESSAGE_BYTES = 512, MOST_AXES = 8, BATCH = 1n;

function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// The C library asks for these where it would print a last message. There is nowhere to print to: it hears of an error.
const REFUSED = 8;
const SYSTEM = { fd_close: () => REFUSED, fd_seek: () => REFUSED, fd_write: () => REFUSED };

function product(shape) {
  return shape.reduce((a, b) => a * b, 1);
}

class Network {
  // Reads `file`, the bytes of network.gfx; an Error says what is wrong with it.
  static async open(runtime, file) {
    const { instance } = await WebAssembly.instantiate(runtime, { wasi_snapshot_preview1: SYSTEM });
    const network = new Network(instance.exports);
    network.read(file);
    return network;
  }

  constructor(c) {
    this.c = c;
    if (c._initialize) c._initialize();
    this.message = this.reserve(MESSAGE_BYTES);
  }

  read(file) {
    const data = this.reserve(file.length), slot = this.reserve(4);
    new Uint8Array(this.c.memory.buffer).set(file, data);
    this.check(this.c.growfx_open_memory(data, file.length, slot, this.message, MESSAGE_BYTES));
    this.c.free(data);
    this.net = new DataView(this.c.memory.buffer).getUint32(slot, true);
    const [inputs, outputs] = [this.c.growfx_input_count(this.net), this.c.growfx_output_count(this.net)];
    if (inputs !== 1 || outputs !== 1) throw new Error(`it has ${inputs} inputs and ${outputs} outputs, not one of each`);
    this.inputShape = this.shape(this.c.growfx_input_shape);
    this.outputShape = this.shape(this.c.growfx_output_shape);
    this.input = this.reserve(4 * product(this.inputShape));
    this.output = this.reserve(4 * product(this.outputShape));
    this.pointers = this.reserve(8);
    new Uint32Array(this.c.memory.buffer, this.pointers, 2).set([this.input, this.output]);
  }

  // The output for a batch of one, as a copy, and the milliseconds of the call.
  run(values) {
    if (values.length !== product(this.inputShape)) {
      throw new Error(`it takes ${product(this.inputShape)} numbers, not ${values.length}`);
    }
    this.view(this.input, this.inputShape).set(values);
    const begin = performance.now();
    const at = this.pointers;
    const code = this.c.growfx_run(this.net, BATCH, at, at + 4, this.message, MESSAGE_BYTES);
    const milliseconds = performance.now() - begin;
    this.check(code);
    return { output: this.view(this.output, this.outputShape).slice(), milliseconds };
  }

  // Memory may have grown, and moved, since the last call.
  view(address, shape) {
    return new Float32Array(this.c.memory.buffer, address, product(shape));
  }

  shape(asked) {
    const sizes = this.reserve(8 * MOST_AXES);
    const rank = asked(this.net, 0, BATCH, sizes);
    const found = rank < 0 ? [] : [...new BigInt64Array(this.c.memory.buffer, sizes, rank)].map(Number);
    this.c.free(sizes);
    return found;
  }

  reserve(size) {
    const address = this.c.malloc(size);
    if (!address) throw new Error(`${size} bytes of memory are not to be had`);
    return address;
  }

  check(code) {
    if (code === 0) return;
    const bytes = new Uint8Array(this.c.memory.buffer, this.message, MESSAGE_BYTES);
    const end = bytes.indexOf(0);
    throw new Error(new TextDecoder().decode(bytes.slice(0, end < 0 ? MESSAGE_BYTES : end)));
  }
}

// Noise that Python makes the same (`growfx.deploy.web.facts`): float32 in [-1, 1), a hash of the place.
function noise(count) {
  const values = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    let bits = Math.imul(i + 1, 0x9e3779b1);
    bits = Math.imul(bits ^ (bits >>> 15), 0x85ebca6b);
    values[i] = ((bits ^ (bits >>> 13)) >>> 8) / 8388608 - 1;
  }
  return values;
}

// The largest difference over the largest value of `theirs`; infinite where numbers are missing.
function relativeError(ours, theirs) {
  let difference = 0, largest = 0;
  if (ours.length !== theirs.length) return Infinity;
  for (let i = 0; i < ours.length; i++) {
    const d = Math.abs(ours[i] - theirs[i]);
    if (!(d <= difference)) difference = Number.isNaN(d) ? Infinity : d;
    largest = Math.max(largest, Math.abs(theirs[i]));
  }
  return largest > 0 ? difference / largest : difference;
}
