// Pictures to the network's input: resampled as Pillow does it, cut to the middle, scaled by mean and standard deviation.

const FILTERS = {
  bilinear: { support: 1, at: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, at: cubic },
  lanczos: { support: 3, at: (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

function cubic(x) {
  const a = -0.5, d = Math.abs(x);
  if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
  return d < 2 ? ((d - 5) * d + 8) * d * a - 4 * a : 0;
}

// Weights are whole numbers of 22 bits behind the point, as Pillow's, so that ties are rounded as there.
const ONE = 1 << 22;

// For each of `size` places of the result the weights of its sources, in a range that begins at `first`.
function windows(length, size, filter) {
  const scale = length / size, stretch = Math.max(scale, 1), reach = filter.support * stretch, found = [];
  for (let i = 0; i < size; i++) {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const last = Math.min(length, Math.trunc(centre + reach + 0.5));
    const weights = [];
    for (let j = first; j < last; j++) weights.push(filter.at((j - centre + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    found.push({ first, weights: weights.map((w) => Math.sign(w) * Math.floor((Math.abs(w) / sum) * ONE + 0.5)) });
  }
  return found;
}

// One direction of a resampling of bytes: `lines` lines, whose samples lie `step` apart, each line `stride` on.
function resampled(bytes, lines, size, source, target, filter) {
  const result = new Uint8ClampedArray(lines * size), places = windows(source.length, size, filter);
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < size; i++) {
      const { first, weights } = places[i];
      let sum = 0;
      for (let j = 0; j < weights.length; j++) {
        sum += weights[j] * bytes[line * source.stride + (first + j) * source.step];
      }
      result[line * target.stride + i * target.step] = Math.floor(sum / ONE + 0.5);
    }
  }
  return result;
}

// A plane of bytes at another size; bytes in between, as Pillow has them. (Pillow sometimes takes height before width.)
function resized(plane, width, height, newWidth, newHeight, kind) {
  const filter = FILTERS[kind];
  let now = plane;
  if (newWidth !== width) {
    const source = { length: width, stride: width, step: 1 };
    now = resampled(now, height, newWidth, source, { stride: newWidth, step: 1 }, filter);
  }
  if (newHeight !== height) {
    const source = { length: height, stride: 1, step: newWidth };
    now = resampled(now, newWidth, newHeight, source, { stride: 1, step: newWidth }, filter);
  }
  return now;
}

// The colour planes of RGBA bytes, or their one grey plane.
function planesOf(rgba, channels) {
  const count = rgba.length / 4;
  const planes = Array.from({ length: channels }, () => new Uint8ClampedArray(count));
  if (channels === 3) {
    planes.forEach((plane, c) => {
      for (let i = 0; i < count; i++) plane[i] = rgba[4 * i + c];
    });
    return planes;
  }
  for (let i = 0; i < count; i++) {
    planes[0][i] = (19595 * rgba[4 * i] + 38470 * rgba[4 * i + 1] + 7471 * rgba[4 * i + 2] + 32768) >> 16;
  }
  return planes;
}

// The size that a picture is brought to before its middle is cut out.
function sizeBefore(width, height, form) {
  const tall = Math.floor(form.height / form.crop_pct), wide = Math.floor(form.width / form.crop_pct);
  if (tall === wide) {
    if (width <= height) return [wide, Math.trunc((tall * height) / width)];
    return [Math.trunc((wide * width) / height), tall];
  }
  const ratio = Math.min(width / wide, height / tall);
  return [Math.round(width / ratio), Math.round(height / ratio)];
}

// Halves to the even side, as Python rounds.
function halved(difference) {
  const half = difference / 2, below = Math.floor(half);
  return half - below === 0.5 && below % 2 === 0 ? below : Math.round(half);
}

// Float32 input of the network (channels, height, width) for an ImageData.
function prepared(image, form) {
  const [width, height] = sizeBefore(image.width, image.height, form);
  const left = halved(width - form.width), top = halved(height - form.height);
  const area = form.width * form.height, input = new Float32Array(form.channels * area);
  planesOf(image.data, form.channels).forEach((plane, c) => {
    const whole = resized(plane, image.width, image.height, width, height, form.interpolation);
    for (let y = 0; y < form.height; y++) {
      for (let x = 0; x < form.width; x++) {
        const value = whole[(top + y) * width + left + x] / 255;
        input[c * area + y * form.width + x] = (value - form.mean[c]) / form.std[c];
      }
    }
  });
  return input;
}

// The drawing on a square of black, as large as its ink allows: digits of data sets fill their image.
function centred(image) {
  let [left, top, right, bottom] = [image.width, image.height, -1, -1];
  for (let y = 0; y < image.height; y++) {
    for (let x = 0; x < image.width; x++) {
      if (image.data[4 * (y * image.width + x)] > 32) {
        left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = Math.max(bottom, y);
      }
    }
  }
  if (right < 0) return null;
  const side = Math.max(right - left, bottom - top) + 1;
  const x0 = Math.round((left + right + 1 - side) / 2), y0 = Math.round((top + bottom + 1 - side) / 2);
  const result = new ImageData(side, side);
  for (let y = 0; y < side; y++) {
    for (let x = 0; x < side; x++) {
      const [u, v] = [x0 + x, y0 + y], at = 4 * (y * side + x);
      const inside = u >= 0 && v >= 0 && u < image.width && v < image.height;
      result.data.fill(inside ? image.data[4 * (v * image.width + u)] : 0, at, at + 3);
      result.data[at + 3] = 255;
    }
  }
  return result;
}

// A square grey picture with fewer pixels a side.
function coarse(image, side) {
  const result = new ImageData(side, side);
  resized(planesOf(image.data, 1)[0], image.width, image.height, side, side, "bilinear").forEach((value, i) => {
    result.data.set([value, value, value, 255], 4 * i);
  });
  return result;
}
