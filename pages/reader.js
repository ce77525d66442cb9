// The reader of an evaluation: its queries, and of one the movement and the windows.

const ROW = 24, TOP = 20; // pixels of a row in page.css; how many ranks are shown at first

// One line for each passage between its places in two rankings: [[document, ...], [document, ...]]
function movement(query, titles, whole) {
  const rank = query.orders.map((order) => new Map(order.map((doc, i) => [doc, i])));
  const near = (doc) => whole || rank.some((ranks) => ranks.get(doc) < TOP);
  const sides = query.orders.map((order) => {
    const rows = []; // a document, or null where ranks are left out
    order.forEach((doc, i) => {
      if (near(doc)) rows.push(doc);
      else if (i && near(order[i - 1])) rows.push(null);
    });
    return rows;
  });
  const chart = el("div", { class: "movement" });
  const trail = (doc) => query.windows.map((windows, run) => {
    const places = windows.map((one, i) => {
      const given = one.given.indexOf(doc);
      return given < 0 ? null : `${i + 1}: ${given + 1}\u2192${one.ranked.indexOf(doc) + 1}`;
    }).filter((place) => place);
    const whose = data.names.length > 1 ? `${data.names[run]}, ` : "";
    return places.length ? `${whose}window: place given\u2192answered. ${places.join(", ")}` : null;
  }).filter((line) => line);
  const list = (side) => el("ol", { "aria-label": titles[side] }, sides[side].map((doc) => {
    if (doc === null) return el("li", { class: "gap" }, "\u22ee");
    const passage = query.docs[doc], from = rank[0].get(doc), to = rank[1].get(doc);
    const moved = from - to; // NaN where only one ranking has it
    const arrow = moved > 0 ? `\u25b2${moved}` : moved < 0 ? `\u25bc${-moved}` : moved === 0 ? "" : "new";
    const item = el("li", { tabindex: -1, "data-doc": doc },
      el("span", { class: "rank" }, String(rank[side].get(doc) + 1)), grade(passage.grade),
      el("span", { class: "snippet" }, passage.text || passage.docid),
      side ? el("span", { class: `moved ${moved > 0 ? "up" : "down"}` }, arrow) : null);
    const where = titles.map((title, i) =>
      rank[i].has(doc) ? `${title} ${rank[i].get(doc) + 1}` : `${title}: not there`);
    return about(item, passage, where.join(", "), ...trail(doc));
  }));
  const lists = [0, 1].map(list);
  for (const one of lists) {
    const items = [...one.querySelectorAll("[data-doc]")];
    if (items.length) items[0].tabIndex = 0;
    one.addEventListener("keydown", (event) => {
      const to = items[items.indexOf(event.target) + { ArrowDown: 1, ArrowUp: -1 }[event.key]];
      if (!to) return;
      event.preventDefault();
      for (const item of items) item.tabIndex = item === to ? 0 : -1;
      to.focus();
    });
  }
  const height = ROW * Math.max(...sides.map((rows) => rows.length));
  const y = (side, doc) => ROW * (sides[side].indexOf(doc) + 0.5);
  const lines = sides[0].filter((doc) => doc !== null && rank[1].has(doc))
    .sort((a, b) => (query.docs[a].grade ?? -1) - (query.docs[b].grade ?? -1)) // relevant ones on top
    .map((doc) => svg("path", {
      class: query.docs[doc].grade > 0 ? `g${Math.min(4, query.docs[doc].grade)}` : "g0",
      "data-doc": doc, d: `M0,${y(0, doc)} C50,${y(0, doc)} 50,${y(1, doc)} 100,${y(1, doc)}` }));
  chart.append(...titles.map((title, i) => el("h4", { class: `side${i}` }, title)), lists[0],
    svg("svg", { viewBox: `0 0 100 ${height}`, style: `height: ${height}px`, preserveAspectRatio: "none",
      "aria-hidden": "true" }, lines), lists[1]);
  return lightUp(chart, "doc");
}

// A window that is opened when asked for; closed, it tells where its relevant passages went.
function windowDetails(query, one, i, n) {
  const moves = one.given.map((doc, from) => ({ doc, from, to: one.ranked.indexOf(doc) }))
    .filter((move) => query.docs[move.doc].grade > 0)
    .sort((a, b) => query.docs[b.doc].grade - query.docs[a.doc].grade || b.to - b.from - (a.to - a.from));
  const node = el("details", {}, el("summary", {},
    el("b", {}, `Window ${i + 1} of ${n}`), ` \u00b7 ${one.tokens} tokens `, flags(one),
    el("span", { class: "moves" }, moves.slice(0, 8).map((move) => el("span", {},
      grade(query.docs[move.doc].grade), ` ${move.from + 1}\u2192${move.to + 1}`)),
    moves.length > 8 ? el("span", {}, `and ${moves.length - 8} more`) : null)));
  node.addEventListener("toggle", () => {
    if (node.childElementCount > 1) return;
    const order = one.ranked.map((doc) => one.given.indexOf(doc));
    node.append(windowView(one.given.map((doc) => query.docs[doc]), one.malformed ? null : order,
      one.response));
  });
  return node;
}

function queryView(query, whole) {
  const compare = data.names.length > 1;
  const titles = compare ? data.names.map((name, i) => `${"AB"[i]}: ${name}`)
    : ["first stage", data.names[0]];
  const [before, after] = query.ndcg;
  const parts = [
    el("h2", {}, short(query.query)),
    short(query.query) === query.query ? null : el("p", { class: "whole" }, query.query),
    el("p", { class: "note" }, `query ${query.qid}. nDCG@10 ${fixed(before)} (${titles[0]}) \u2192 `,
      `${fixed(after)} (${titles[1]}): `, gain(after - before),
      `. ${query.relevant} passages are judged above 0`, query.docs.length
        ? `, ${query.docs.filter((passage) => passage.grade > 0).length} of them among these.` : "."),
  ];
  if (!query.docs.length) {
    return [...parts, el("p", {}, "Its passages are left out of this page, whose size has a bound.")];
  }
  const longest = Math.max(...query.orders.map((order) => order.length));
  const toggle = el("button", { type: "button", onclick: () => show(!whole) });
  const chart = el("div");
  const show = (all) => {
    whole = all;
    toggle.textContent = all ? `the top ${TOP} alone` : `all ${longest}`;
    chart.replaceChildren(movement(query, titles, all));
  };
  show(longest <= TOP);
  const windows = query.windows.map((list, run) => el("div", {},
    compare ? el("h4", {}, titles[run]) : null,
    list.length ? list.map((one, i) => windowDetails(query, one, i, list.length)) : el("p", {}, "None.")));
  for (const column of windows) {
    if (column.lastElementChild.matches("details")) column.lastElementChild.open = !compare;
  }
  return [...parts,
    el("h3", {}, "What moved ", longest > TOP ? toggle : null), chart,
    el("h3", {}, "Windows, as they were asked"),
    el("p", { class: "note" }, "With each relevant passage: its grade, the place it was given at \u2192 the place ",
      "it was ranked. A malformed answer keeps the given order."),
    el("div", { class: compare ? "windows two" : "windows" }, windows)];
}

const gain = (value) =>
  el("span", { class: value > 0 ? "up" : value < 0 ? "down" : "soft" }, signed(value));

function bar(part) { // a gain to the right of the middle, a loss to the left; part: -1 to 1
  return svg("svg", { class: "bar", viewBox: "0 0 48 10", "aria-hidden": "true" },
    svg("rect", { class: part > 0 ? "up" : "down", x: 24 + Math.min(0, part) * 24, y: 1,
      width: 24 * Math.abs(part), height: 8 }),
    svg("line", { x1: 24, x2: 24, y1: 0, y2: 10 }));
}

function readerPage() {
  const compare = data.names.length > 1, article = find("#query");
  const difference = (row) => row.ndcg[1] - row.ndcg[0];
  const widest = Math.max(...data.queries.map((row) => Math.abs(difference(row))), 1e-9);
  const columns = [
    { name: "query", title: "Query", value: (row) => row.query, show: (row) =>
      [short(row.query), " ", row.flags ? el("strong", { class: "flag",
        title: "windows that are malformed, cut off or too long" }, String(row.flags)) : null] },
    ...[0, 1].map((i) => ({ name: ["before", "after"][i], number: true, value: (row) => row.ndcg[i],
      title: (compare ? "AB" : ["First", "Final"])[i], show: (row) => fixed(row.ndcg[i]) })),
    { name: "gain", title: compare ? "B \u2212 A" : "Gain", number: true, show: (row) =>
      [bar(difference(row) / widest), gain(difference(row))],
      value: compare ? (row) => Math.abs(difference(row)) : difference },
  ];
  data.queries.forEach((row, place) => {
    row.place = place;
    row.flags = row.windows.flat().filter((one) => wrong(one).length).length;
  });
  const words = (row) => [row.query, row.qid, ...row.windows.flat().flatMap(wrong)].join("\n");
  const open = (row, tr, enter) => {
    article.replaceChildren(...queryView(row, false));
    history.replaceState(null, "", `#q=${encodeURIComponent(row.qid)}`);
    if (!enter) return;
    article.focus();
    article.scrollIntoView({ block: "start" });
  };
  const list = table(columns, data.queries, ["gain", compare], words, open);
  const asked = new URLSearchParams(location.hash.slice(1)).get("q");
  const first = Math.max(0, list.indexOf((row) => row.qid === asked));
  if (data.queries.length) list.choose(first, false);
}

readerPage();
performance.mark("shown");
