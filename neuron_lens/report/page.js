"use strict";
// The pages work without this script; it adds sorting, filtering and paging to the index, and a keyboard
// reading of token values to the unit pages. Nothing is ever built from strings of markup.

(function index() {
  const table = document.querySelector("table.units");
  if (!table) return;
  const body = table.tBodies[0];
  const headers = [...table.querySelectorAll("th[data-key]")];
  const keys = headers.map((header) => header.dataset.key);
  const pageSize = 200;
  const rows = [...body.rows].map((row, order) => {
    const values = keys.map((_, column) => {
      const value = row.cells[column].dataset.v;
      return value === undefined || value === "" ? null : Number(value);
    });
    return { row, order, values, layer: row.dataset.layer, text: null };
  });
  const find = (id) => document.getElementById(id);
  const [query, layer, least, status, previous, next] =
    ["query", "layer", "least", "status", "previous", "next"].map(find);
  const state = { sort: "", dir: "", q: "", layer: "", min: "", page: "1" };
  let shown = rows;

  function readHash() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const name in state) state[name] = given.get(name) ?? (name === "page" ? "1" : "");
    if (!keys.includes(state.sort)) state.sort = "";
    query.value = state.q;
    layer.value = state.layer;
    least.value = state.min;
    update();
  }

  function writeHash() {
    const kept = new URLSearchParams();
    for (const name in state) if (state[name] && !(name === "page" && state.page === "1")) kept.set(name, state[name]);
    history.replaceState(null, "", "#" + kept.toString());
    update();
  }

  function compare(column, sign) {
    return (a, b) => {
      const x = a.values[column], y = b.values[column];
      // What was not measured comes last, whichever way the table is sorted.
      if (x === null || y === null) return (x === null) - (y === null) || a.order - b.order;
      return sign * (x - y) || a.order - b.order;
    };
  }

  function update() {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const minimum = state.min === "" ? null : Number(state.min);
    const score = keys.indexOf(table.dataset.main);
    shown = rows.filter((entry) => {
      if (state.layer && entry.layer !== state.layer) return false;
      if (minimum !== null && !(entry.values[score] !== null && entry.values[score] >= minimum)) return false;
      if (!words.length) return true;
      entry.text ??= entry.row.textContent.toLowerCase();
      return words.every((word) => entry.text.includes(word));
    });
    if (state.sort) {
      const column = keys.indexOf(state.sort);
      shown.sort(compare(column, direction(column) === "ascending" ? 1 : -1));
    }
    headers.forEach((header, column) => {
      if (keys[column] === state.sort) header.setAttribute("aria-sort", direction(column));
      else header.removeAttribute("aria-sort");
    });
    const pages = Math.max(1, Math.ceil(shown.length / pageSize));
    const page = Math.min(pages, Math.max(1, parseInt(state.page, 10) || 1));
    body.replaceChildren(...shown.slice((page - 1) * pageSize, page * pageSize).map((entry) => entry.row));
    status.textContent = `${shown.length} of ${rows.length} units` + (pages > 1 ? `, page ${page} of ${pages}` : "");
    previous.disabled = page <= 1;
    next.disabled = page >= pages;
    previous.hidden = next.hidden = pages === 1;
    state.page = String(page);
  }

  function direction(column) {
    if (state.dir === "asc") return "ascending";
    if (state.dir === "desc") return "descending";
    return headers[column].dataset.first;
  }

  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const again = state.sort === keys[column];
      const flipped = direction(column) === "ascending" ? "desc" : "asc";
      state.dir = again ? flipped : "";
      state.sort = keys[column];
      state.page = "1";
      writeHash();
    });
  });
  for (const [input, name] of [[query, "q"], [layer, "layer"], [least, "min"]]) {
    input.addEventListener("input", () => { state[name] = input.value; state.page = "1"; writeHash(); });
  }
  const turn = (step) => () => { state.page = String(Number(state.page) + step); writeHash(); };
  previous.addEventListener("click", turn(-1));
  next.addEventListener("click", turn(1));
  window.addEventListener("hashchange", readHash);
  // Printing shows every unit that passes the filter, not one page of them.
  window.addEventListener("beforeprint", () => body.replaceChildren(...shown.map((entry) => entry.row)));
  window.addEventListener("afterprint", update);
  for (const element of document.querySelectorAll("[data-needs-script]")) element.hidden = false;
  readHash();
})();

(function windows() {
  const readout = document.getElementById("readout");
  if (!readout) return;
  let here = null;
  function show(token) {
    if (here) here.classList.remove("here");
    here = token;
    if (token) token.classList.add("here");
    readout.textContent = token ? `${token.textContent.trim() || "whitespace"}:  ${token.title}` : "";
  }
  for (const tokens of document.querySelectorAll(".tokens[tabindex]")) {
    const spans = tokens.getElementsByTagName("i");
    tokens.addEventListener("blur", () => show(null));
    tokens.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1 };
      if (event.key === "Escape") return show(null);
      if (!(event.key in steps)) return;
      const at = [...spans].indexOf(here);
      const to = at < 0 ? (steps[event.key] > 0 ? 0 : spans.length - 1) : at + steps[event.key];
      show(spans[Math.min(spans.length - 1, Math.max(0, to))]);
      event.preventDefault();
    });
  }
})();
