// The residency map: what each cell is (kinds), and a canvas that draws only the cells that changed.

const KINDS = {
  absent: { name: "not resident", fill: "--cell-empty" },
  idle: { name: "resident, idle", fill: "--cell-idle" },
  leased: { name: "leased by a request", fill: "--cell-leased", dot: true },
  arriving: { name: "being read", fill: "--cell-arriving", cross: true },
  wanted: { name: "in the selection and resident", fill: "--cell-leased" },
  held: { name: "in the selection and leased", fill: "--cell-leased", dot: true },
  missing: { name: "in the selection, not resident", fill: "--cell-empty", edge: "--cell-missing" },
  other: { name: "resident for others", fill: "--cell-idle" },
  shared0: { name: "kept by no task", fill: "--cell-empty" },
  shared1: { name: "kept by one", fill: "--accent", alpha: 0.3 },
  shared2: { name: "by two or three", fill: "--accent", alpha: 0.55 },
  shared4: { name: "by four or more", fill: "--accent", alpha: 0.95 },
};
for (const [id, kind] of Object.entries(KINDS)) kind.id = id;

const BY_STATE = ["absent", "idle", "leased", "arriving"];
const BY_TASK = ["missing", "wanted", "held", "other", "absent", "arriving"];
const SHARED = ["shared0", "shared1", "shared2", "shared4"];

// The kind of every expert, f(layer, expert) -> id, with a count of each.
export function kindsOf(found, tasks, chosen, task) {
  const leased = new Set(found.leased_slots), unfilled = new Set(found.unfilled_slots);
  const state = (slot) => (slot < 0 ? "absent" : unfilled.has(slot) ? "arriving" : leased.has(slot) ? "leased" : "idle");
  let of = (slot) => state(slot);
  let legend = BY_STATE;
  if (task) {
    const inside = task.experts.map((ids) => new Set(ids));
    const within = { absent: "missing", idle: "wanted", leased: "held", arriving: "arriving" };
    const outside = { absent: "absent", idle: "other", leased: "other", arriving: "arriving" };
    of = (slot, layer, expert) => (inside[layer].has(expert) ? within : outside)[state(slot)];
    legend = BY_TASK;
  } else if (chosen === "shared") {
    const keeping = keepers(found, tasks);
    of = (_slot, layer, expert) => sharedKind(keeping[layer][expert]);
    legend = SHARED;
  }
  const counts = {};
  const table = found.table.map((row, layer) => row.map((slot, expert) => {
    const kind = of(slot, layer, expert);
    counts[kind] = (counts[kind] ?? 0) + 1;
    return kind;
  }));
  return { table, counts, legend: legend.map((id) => KINDS[id]) };
}

function sharedKind(number) {
  return number >= 4 ? "shared4" : number >= 2 ? "shared2" : number === 1 ? "shared1" : "shared0";
}

function keepers(found, tasks) {
  const counts = found.table.map((row) => row.map(() => 0));
  for (const task of Object.values(tasks)) {
    task.experts.forEach((ids, layer) => ids.forEach((expert) => { counts[layer][expert]++; }));
  }
  return counts;
}

export function cellText({ layer, expert, slot }, found, tasks) {
  if (layer === undefined) return `Slot ${slot}: empty.`;
  const at = found.table[layer][expert];
  const where = at < 0 ? "not resident" : `slot ${at}`;
  const how = found.unfilled_slots.includes(at) ? ", being read" : found.leased_slots.includes(at) ? ", leased by a request" : "";
  const keep = Object.entries(tasks).filter(([, task]) => task.experts[layer].includes(expert)).map(([name]) => name);
  return `Layer ${layer}, expert ${expert}: ${where}${how}. Kept by ${keep.length ? keep.join(", ") : "no task"}.`;
}

const GAP = 2;
const LEAST = 6, MOST = 18;  // pixels of a cell's width
const TALLEST = 26, TALL_ENOUGH = 200;  // and of its height, where there are few rows
const GUTTER = 34, HEAD = 18;  // for the numbers of rows and columns

export class ExpertMap {
  constructor(chosen) {
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", "Map of the experts");
    this.canvas.setAttribute("aria-describedby", "map-summary");
    this.chosen = chosen;
    this.cursor = null;
    this.drawn = new Map();
    this.theme = 0;
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.move(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("blur", () => this.move(null));
    this.restyle = () => { this.theme++; this.forget(); };
    this.resize = new ResizeObserver(() => this.forget());
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
  }

  listen() {
    document.addEventListener("theme", this.restyle);
    this.scheme.addEventListener("change", this.restyle);
    this.resize.observe(this.canvas.parentElement);
  }

  deafen() {
    document.removeEventListener("theme", this.restyle);
    this.scheme.removeEventListener("change", this.restyle);
    this.resize.disconnect();
  }

  forget() {
    this.size = null;
    if (this.last) this.draw(...this.last);
  }

  draw(found, kinds, order) {
    this.last = [found, kinds, order];
    this.rows = order === "slots" ? slotRows(found, kinds) : expertRows(kinds);
    this.fit(`${order} ${this.rows.length} ${this.rows[0].length}`);
    this.rows.forEach((row, y) => row.forEach((cell, x) => this.paint(cell, x, y)));
  }

  // A new size clears the canvas; the same size keeps what is drawn, so that only changes are painted.
  fit(shape) {
    const width = this.canvas.parentElement.clientWidth;
    const size = `${shape} ${width} ${devicePixelRatio}`;
    if (size === this.size) return;
    this.size = size;
    const columns = Math.max(...this.rows.map((row) => row.length));
    this.cell = Math.max(LEAST, Math.min(MOST, Math.floor((width - GUTTER) / columns) - GAP));
    this.tall = Math.max(this.cell, Math.min(TALLEST, Math.floor(TALL_ENOUGH / this.rows.length) - GAP));
    const [across, down] = [GUTTER + columns * (this.cell + GAP), HEAD + this.rows.length * (this.tall + GAP)];
    this.canvas.width = across * devicePixelRatio;
    this.canvas.height = down * devicePixelRatio;
    this.canvas.style.width = `${across}px`;
    this.canvas.style.height = `${down}px`;
    this.context = this.canvas.getContext("2d");
    this.context.scale(devicePixelRatio, devicePixelRatio);
    this.drawn.clear();
    this.number();
  }

  number() {
    this.context.fillStyle = this.colour("--muted");
    this.context.font = "11px system-ui, sans-serif";
    this.context.textBaseline = "middle";
    this.context.textAlign = "right";
    const every = Math.ceil(12 / (this.tall + GAP));
    this.rows.forEach((row, y) => {
      if (y % every === 0) this.context.fillText(row.label ?? y, GUTTER - 8, this.top(y) + this.tall / 2);
    });
    this.context.textAlign = "left";
    for (let x = 0; x < this.rows[0].length; x += 8) this.context.fillText(x, this.left(x), 8);
  }

  left(x) {
    return GUTTER + x * (this.cell + GAP);
  }

  top(y) {
    return HEAD + y * (this.tall + GAP);
  }

  paint(cell, x, y) {
    const marked = this.cursor?.x === x && this.cursor?.y === y;
    const key = `${cell.kind} ${marked}`, place = y * 65536 + x;
    if (this.drawn.get(place) === key) return;
    this.drawn.set(place, key);
    const [left, top] = [this.left(x), this.top(y)];
    this.context.clearRect(left - 1, top - 1, this.cell + GAP, this.tall + GAP);
    stamp(this.context, KINDS[cell.kind], left, top, this.cell, this.tall, (name) => this.colour(name));
    if (!marked) return;
    this.context.strokeStyle = this.colour("--text");
    this.context.lineWidth = 2;
    this.context.strokeRect(left, top, this.cell, this.tall);
  }

  // A CSS colour as the canvas takes it: a pair of light and dark is resolved by an element that wears it.
  colour(name) {
    if (this.coloursOf !== this.theme) {
      this.coloursOf = this.theme;
      this.colours = new Map();
    }
    if (!this.colours.has(name)) {
      this.canvas.style.color = `var(${name})`;
      this.colours.set(name, getComputedStyle(this.canvas).color);
    }
    return this.colours.get(name);
  }

  swatch(kind) {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 14 * devicePixelRatio;
    canvas.style.width = canvas.style.height = "14px";
    canvas.setAttribute("aria-hidden", "true");
    const context = canvas.getContext("2d");
    context.scale(devicePixelRatio, devicePixelRatio);
    stamp(context, kind, 0, 0, 14, 14, (name) => this.colour(name));
    return canvas;
  }

  point(event) {
    const x = Math.floor((event.offsetX - GUTTER) / (this.cell + GAP));
    const y = Math.floor((event.offsetY - HEAD) / (this.tall + GAP));
    this.move(this.rows?.[y]?.[x] ? { x, y } : null);
  }

  key(event) {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!by || !this.rows) return;
    event.preventDefault();
    const { x, y } = this.cursor ?? { x: -by[0], y: -by[1] };
    const row = Math.min(Math.max(y + by[1], 0), this.rows.length - 1);
    this.move({ x: Math.min(Math.max(x + by[0], 0), this.rows[row].length - 1), y: row });
  }

  move(cursor) {
    const before = this.cursor;
    if (before?.x === cursor?.x && before?.y === cursor?.y) return;
    this.cursor = cursor;
    for (const at of [before, cursor]) if (at && this.rows[at.y]?.[at.x]) this.paint(this.rows[at.y][at.x], at.x, at.y);
    if (before) this.neighbours(before);
    this.retell();
  }

  // The frame of the old cursor reached a pixel into the cells beside it.
  neighbours({ x, y }) {
    for (const [dx, dy] of [[-1, 0], [1, 0], [0, -1], [0, 1]]) {
      const cell = this.rows[y + dy]?.[x + dx];
      this.drawn.delete((y + dy) * 65536 + x + dx);
      if (cell) this.paint(cell, x + dx, y + dy);
    }
  }

  retell() {
    this.chosen(this.cursor ? this.rows[this.cursor.y]?.[this.cursor.x] ?? null : null);
  }
}

function expertRows(kinds) {
  return kinds.table.map((row, layer) => row.map((kind, expert) => ({ kind, layer, expert })));
}

function slotRows(found, kinds) {
  const slots = Array.from({ length: found.slots }, (_, slot) => ({ kind: "absent", slot }));
  found.table.forEach((row, layer) => row.forEach((slot, expert) => {
    if (slot >= 0) slots[slot] = { kind: kinds.table[layer][expert], layer, expert, slot };
  }));
  const width = Math.min(64, found.slots);
  const rows = [];
  for (let at = 0; at < slots.length; at += width) {
    rows.push(slots.slice(at, at + width));
    rows.at(-1).label = at;
  }
  return rows;
}

function stamp(context, kind, left, top, wide, tall, colour) {
  context.globalAlpha = kind.alpha ?? 1;
  context.fillStyle = colour(kind.fill);
  context.fillRect(left, top, wide, tall);
  context.globalAlpha = 1;
  if (kind.edge) {
    context.strokeStyle = colour(kind.edge);
    context.lineWidth = 1.5;
    context.strokeRect(left + 1, top + 1, wide - 2, tall - 2);
  }
  context.fillStyle = colour("--surface");
  const dot = Math.min(wide, tall) / 3;
  if (kind.dot) context.fillRect(left + (wide - dot) / 2, top + (tall - dot) / 2, dot, dot);
  if (kind.cross) context.fillRect(left, top + tall * 0.42, wide, tall * 0.16);
}
