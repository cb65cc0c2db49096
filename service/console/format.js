// Numbers as people read them. Sizes are binary, as the command line shows them.

const UNITS = [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]];
const NONE = "–";

export function bytes(size) {
  if (size === null || size === undefined) return NONE;
  const [unit, factor] = UNITS.find(([, least]) => Math.abs(size) >= least) ?? ["B", 1];
  const value = size / factor;
  return `${unit === "B" ? value : value.toPrecision(value >= 1000 ? 4 : 3)} ${unit}`;
}

export function percent(share, digits = 1) {
  return share === null || share === undefined ? NONE : `${(100 * share).toFixed(digits)}%`;
}

export function fixed(value, digits) {
  return value === null || value === undefined ? NONE : value.toFixed(digits);
}

export function milliseconds(value) {
  if (value === null || value === undefined) return NONE;
  return value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value.toFixed(value >= 10 ? 0 : 1)} ms`;
}

export function seconds(value) {
  return value === null || value === undefined ? NONE : milliseconds(1000 * value);
}

export function count(value) {
  return value === null || value === undefined ? NONE : value.toLocaleString("en");
}

export function moment(iso) {
  return new Date(iso).toLocaleString();
}
