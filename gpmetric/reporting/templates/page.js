"use strict";
(() => {
  const root = document.documentElement, find = (what, from = document) => [...from.querySelectorAll(what)];
  const kept = (where) => {  // what survives a reload; a browser may refuse it
    try { return window[where]; } catch { return null; }
  };
  const local = kept("localStorage"), session = kept("sessionStorage");
  root.classList.add("script");

  const said = document.getElementById("said");
  const say = (words) => { said.textContent = ""; setTimeout(() => { said.textContent = words; }, 50); };

  const theme = document.getElementById("theme"), dark = matchMedia("(prefers-color-scheme: dark)");
  const shown = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const label = () => { theme.textContent = shown() === "dark" ? "Light" : "Dark"; };
  const stored = local && local.getItem("gpmetric-theme");
  if (stored === "light" || stored === "dark") root.dataset.theme = stored;
  theme.addEventListener("click", () => {
    root.dataset.theme = shown() === "dark" ? "light" : "dark";
    if (local) local.setItem("gpmetric-theme", root.dataset.theme);
    label();
  });
  dark.addEventListener("change", label);
  label();

  const copy = async (text) => {
    if (navigator.clipboard) {
      try { await navigator.clipboard.writeText(text); return true; } catch { /* not allowed here: the older way */ }
    }
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  };
  document.addEventListener("click", async (event) => {
    const button = event.target.closest(".copy");
    if (!button) return;
    const done = await copy(button.dataset.copy);
    button.focus();
    say(done ? `${button.dataset.what} copied` : `${button.dataset.what} could not be copied`);
    button.firstChild.textContent = done ? "Copied" : "Not copied";
    setTimeout(() => { button.firstChild.textContent = "Copy"; }, 1500);
  });

  const points = find(".point");
  const select = (id) => {
    if (!points.some((one) => one.getAttribute("href") === `#${id}`)) return;
    for (const panel of find(".panel")) panel.classList.toggle("on", panel.id === id);
    for (const group of find(".live-figures svg")) {
      const own = find(".point", group);
      for (const one of own) {
        const is = one.getAttribute("href") === `#${id}`;
        if (is) one.setAttribute("aria-current", "true"); else one.removeAttribute("aria-current");
        one.setAttribute("tabindex", is ? "0" : "-1");
      }
      if (own.length && !own.some((one) => one.getAttribute("tabindex") === "0")) own[0].setAttribute("tabindex", "0");
    }
    if (session) session.setItem("gpmetric-point", id);
  };
  const choose = (point) => {
    const id = point.getAttribute("href").slice(1);
    select(id);
    say(`${document.getElementById(id).querySelector("h3").textContent} is shown below`);
  };
  for (const point of points) {
    point.addEventListener("click", (event) => {
      event.preventDefault();
      choose(point);
    });
    point.addEventListener("keydown", (event) => {
      const own = find(".point", point.closest("svg")), at = own.indexOf(point);
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: own.length - 1 }[event.key];
      if (event.key === " ") event.preventDefault();
      if (event.key === " ") choose(point);
      if (to === undefined) return;
      event.preventDefault();
      const next = own[Math.min(own.length - 1, Math.max(0, to))];
      choose(next);
      next.focus();
    });
  }
  const before = session && document.body.dataset.live ? session.getItem("gpmetric-point") : "";
  const first = find(".panel.on")[0];
  if (first) select(first.id);
  if (before) select(before);
  if (location.hash) select(location.hash.slice(1));

  const data = document.getElementById("rows");
  if (data) {
    const { rows, total, what, ...given } = JSON.parse(data.textContent), body = document.querySelector("#candidate-rows tbody");
    const heads = find("#candidate-rows thead th"), search = document.getElementById("search");
    const more = document.getElementById("more"), found = document.getElementById("found");
    const STEP = 20;
    let order = rows, shownRows = 0, sorted = given.sorted, falling = false;
    const cell = (value, at) => {
      const made = document.createElement(at ? "td" : "th");
      if (!at) { made.scope = "row"; made.className = "code"; }
      if (heads[at].classList.contains("number")) made.className = "number";
      made.textContent = value === null ? "\u2013" : Number.isInteger(value) || typeof value === "string" ? value : value.toFixed(4);
      return made;
    };
    const add = (count) => {
      for (const row of order.slice(shownRows, shownRows + count)) {
        const line = document.createElement("tr");
        line.append(...row.map(cell));
        body.append(line);
      }
      shownRows = Math.min(order.length, shownRows + count);
      more.hidden = shownRows >= order.length;
    };
    const show = () => {
      const words = search.value.toLowerCase().trim();
      order = rows.filter((row) => !words || row[0].toLowerCase().includes(words) || row[1].includes(words));
      order.sort((one, other) => {
        const [a, b] = [one[sorted], other[sorted]];
        if (a === null || b === null) return (a === null) - (b === null);
        return (a < b ? -1 : a > b ? 1 : 0) * (falling ? -1 : 1);
      });
      heads.forEach((head, at) => {
        if (at === sorted) head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      });
      const whole = total === rows.length ? "" : `, the best of ${total.toLocaleString("en")}`;
      found.textContent = `${order.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} ${what}${whole}`;
      body.replaceChildren();
      shownRows = 0;
      add(STEP);
      if (session) session.setItem("gpmetric-candidates", JSON.stringify([search.value, sorted, falling]));
    };
    heads.forEach((head, at) => head.querySelector("button").addEventListener("click", () => {
      falling = at === sorted ? !falling : false;
      sorted = at;
      show();
    }));
    search.addEventListener("input", show);
    search.form.addEventListener("submit", (event) => event.preventDefault());
    more.addEventListener("click", () => add(10 * STEP));
    if (session && document.body.dataset.live && session.getItem("gpmetric-candidates")) {
      [search.value, sorted, falling] = JSON.parse(session.getItem("gpmetric-candidates"));
    }
    show();
  }

  const seconds = Number(document.body.dataset.live || 0);
  if (seconds) {
    const live = document.getElementById("live");
    let tag = null;
    const look = async () => {
      try {
        const answer = await fetch("/", { cache: "no-store" }), now = answer.headers.get("ETag");
        if (tag !== null && now !== tag && document.activeElement.id !== "search") location.reload();
        tag = tag === null ? now : tag;
        live.textContent = `live: looked at again every ${seconds} s`;
      } catch {
        live.textContent = "The campaign's process does not answer any more; this is its last page.";
      }
    };
    look();
    setInterval(look, 1000 * seconds);
  }
})();
