"use strict";
// What is shown was written by strangers. It comes as JSON and is put in as text nodes, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const find = (selector, root = document) => root.querySelector(selector);

// ------------------------------------------------------------------------------ elements, numbers

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}
const el = (name, attributes = {}, ...children) =>
  fill(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

const minus = (text) => text.replace("-", "\u2212");
const fixed = (value, digits = 3) => minus(value.toFixed(digits));
const signed = (value, digits = 3) => (value > 0 ? "+" : "") + fixed(value, digits);
const short = (text) => (text.length > 90 ? `${text.slice(0, 87)}...` : text); // in a list

function grade(value) {
  if (value === null) return el("span", { class: "grade", title: "not judged" }, "\u2013");
  const level = Math.max(0, Math.min(4, value));
  return el("span", { class: `grade g${level}`, title: `grade ${value}` }, minus(String(value)));
}
// What went wrong with an answer, in words; a window that was too long was not asked about at all.
const wrong = (answer) => answer.too_long ? ["too long"]
  : ["malformed", "cut_off"].filter((flag) => answer[flag]).map((flag) => flag.replace("_", " "));
const flags = (answer) =>
  wrong(answer).flatMap((words) => [el("strong", { class: "flag" }, words), " "]);

// ---------------------------------------------------- a passage, shown over what one points to

const card = el("div", { id: "card", role: "tooltip", hidden: "" });
document.body.append(card);

function about(node, passage, ...more) {
  const hide = () => { card.hidden = true; };
  const show = () => {
    card.replaceChildren(
      el("p", { class: "head" }, grade(passage.grade), el("span", { class: "docid" }, passage.docid)),
      el("p", {}, passage.text || "(no text)"), ...more.map((line) => el("p", { class: "note" }, line)));
    card.hidden = false;
    const at = node.getBoundingClientRect(), size = card.getBoundingClientRect();
    const below = at.bottom + size.height + 8 < innerHeight || at.top < size.height + 8;
    const left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - size.width - 8));
    card.style.left = `${left + scrollX}px`;
    card.style.top = `${(below ? at.bottom + 4 : at.top - size.height - 4) + scrollY}px`;
  };
  fill(node, { onmouseenter: show, onmouseleave: hide, onfocus: show, onblur: hide,
               "aria-describedby": "card" }, []);
  return node;
}

// Whatever has the same data-NAME as what one points to, or as what has the focus, is lit.
function lightUp(root, name) {
  const held = {};
  const paint = (kind, node) => {
    held[kind] = node?.dataset[name];
    for (const other of root.querySelectorAll(`[data-${name}]`)) {
      other.classList.toggle("lit", Object.values(held).includes(other.dataset[name]));
    }
  };
  for (const [on, off] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
    root.addEventListener(on, (event) => paint(on, event.target.closest(`[data-${name}]`)));
    root.addEventListener(off, () => paint(on, null));
  }
  return root;
}

// --------------------------------------------- a window: its passages beside what was written

// A response with each label [i] of a passage as a link to it; `go` shows that passage.
function linked(response, passages, go) {
  const pieces = [];
  let end = 0;
  for (const found of response.matchAll(/\[\s*(\d{1,9})\s*\]|<\/?(?:think|answer)>/g)) {
    pieces.push(response.slice(end, found.index));
    end = found.index + found[0].length;
    const i = Number(found[1]) - 1;
    if (found[1] === undefined) pieces.push(el("span", { class: "tag" }, found[0]));
    else if (!(i in passages)) pieces.push(found[0]);
    else {
      const link = el("a", { href: "#", class: "label", "data-i": i }, found[0]);
      link.addEventListener("click", (event) => { event.preventDefault(); go(i, link); });
      pieces.push(about(link, passages[i]));
    }
  }
  return [...pieces, response.slice(end)];
}

// passages: [{docid, grade, text}]; order: positions as ranked, best first (null: none could be read)
function windowView(passages, order, response) {
  const view = el("div", { class: "window" });
  let mention = null; // where one came from, to go back to
  const go = (i, link) => {
    mention = link;
    card.hidden = true;
    const passage = find(`li[data-i="${i}"]`, view);
    passage.scrollIntoView({ block: "nearest" });
    passage.focus();
  };
  const back = (event) => {
    if (event.key !== "Escape" || !mention) return;
    event.stopPropagation();
    mention.focus();
    mention = null;
  };
  const items = passages.map((passage, i) =>
    el("li", { tabindex: -1, "data-i": i, onkeydown: back },
      el("p", { class: "head" }, el("b", {}, `[${i + 1}]`), grade(passage.grade),
        el("span", { class: "docid" }, passage.docid),
        order ? el("span", { class: "place", title: "its place in the answer" },
          `\u2192 ${order.indexOf(i) + 1}`) : null),
      el("p", {}, passage.text || "(no text)")));
  const text = el("div", { class: "response" }, linked(response, passages, go));
  view.append(el("ol", { class: "passages", "aria-label": "passages, as given" }, items), text);
  return lightUp(view, "i");
}

// ------------------------------------------------- a table to sort, search and filter, row by row

const PAGE_OF_ROWS = 200;

// columns: [{name, title, value(row), show(row) -> nodes, number}]; sort: [name, whether falling];
// words(row): what a search looks at; open(row, tr, whether by hand): what a row opens to.
function table(columns, rows, sort, words, open) {
  const form = find("form.filters"), body = el("tbody");
  let shown = [], limit = PAGE_OF_ROWS, [by, falling] = sort, at = -1;
  const column = (name) => columns.find((one) => one.name === name);
  const kind = (one) => `${one.name}${one.number ? " n" : ""}`;
  const heads = columns.map((one) => el("th", { class: kind(one), scope: "col" },
    el("button", { type: "button", onclick: () => {
      falling = by === one.name ? !falling : Boolean(one.number);
      by = one.name;
      draw();
    } }, one.title)));

  function matches(row) {
    for (const input of form.querySelectorAll("input")) {
      const [bound, name] = input.name.split("-");
      if (input.value === "") continue;
      if (!name) {
        row.words ??= words(row).toLowerCase();
        if (!row.words.includes(input.value.toLowerCase())) return false;
      } else {
        const value = column(name).value(row), limit = Number(input.value);
        if (bound === "min" ? value < limit : value > limit) return false;
      }
    }
    return true;
  }

  function draw() {
    const value = column(by).value, sign = falling ? -1 : 1;
    shown = rows.filter(matches).sort((a, b) =>
      sign * (value(a) > value(b) ? 1 : value(a) < value(b) ? -1 : 0) || a.place - b.place);
    heads.forEach((head, i) => head.setAttribute("aria-sort",
      columns[i].name !== by ? "none" : falling ? "descending" : "ascending"));
    body.replaceChildren(...shown.slice(0, limit).map(line));
    if (shown.length > limit) {
      body.append(el("tr", {}, el("td", { colspan: columns.length }, el("button", {
        type: "button", class: "more", onclick: () => { limit += PAGE_OF_ROWS; draw(); },
      }, `show more of ${shown.length}`))));
    }
    at = shown.findIndex((row) => row.opened);
    find("output", form).textContent = `${shown.length} of ${rows.length}`;
    reach(buttons()[Math.max(at, 0)]);
  }

  const line = (row) => el("tr", { class: "row", "aria-current": row.opened ? "true" : null },
    columns.map((one, i) => el("td", { class: kind(one) },
      i === 0 ? el("button", { type: "button", class: "open" }, one.show(row)) : one.show(row))));
  const buttons = () => [...body.querySelectorAll("button.open")];
  const reach = (button) => { // the one row that Tab stops at
    for (const other of buttons()) other.tabIndex = other === button ? 0 : -1;
  };

  function choose(index, enter) {
    if (!(index in shown) || index >= limit) return;
    at = index;
    const button = buttons()[index], tr = button.closest("tr");
    reach(button);
    for (const other of body.querySelectorAll("tr.row")) other.removeAttribute("aria-current");
    for (const row of rows) row.opened = row === shown[index];
    tr.setAttribute("aria-current", "true");
    open(shown[index], tr, enter);
  }

  body.addEventListener("click", (event) => {
    const tr = event.target.closest("tr.row");
    if (!tr) return;
    find("button", tr).focus();
    choose([...body.querySelectorAll("tr.row")].indexOf(tr), true);
  });
  body.addEventListener("keydown", (event) => {
    const all = buttons(), index = all.indexOf(event.target);
    const to = { ArrowDown: index + 1, ArrowUp: index - 1, Home: 0, End: all.length - 1 }[event.key];
    if (index < 0 || !(to in all)) return;
    event.preventDefault();
    reach(all[to]);
    all[to].focus();
  });
  form.addEventListener("input", () => { limit = PAGE_OF_ROWS; draw(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "j" || event.key === "k") {
      choose(at + (event.key === "j" ? 1 : -1), false);
      if (at >= 0) buttons()[at].focus();
    } else if (event.key === "/") find("input[type=search]", form).focus();
    else if (event.key === "Escape" && at >= 0) buttons()[at].focus();
    else return;
    event.preventDefault();
  });
  find("#table").append(el("table", {}, el("thead", {}, el("tr", {}, heads)), body));
  draw();
  return { choose, indexOf: (test) => shown.findIndex(test) };
}
