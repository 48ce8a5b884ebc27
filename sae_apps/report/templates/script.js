"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Charts: one Tab stop each, arrow keys walk along the marks; the page's own label replaces the
  // browser's slow tooltip.
  for (const chart of all("svg.chart")) {
    const marks = all(".mark", chart);
    marks.forEach((mark, i) => {
      const title = mark.querySelector("title");
      mark.setAttribute("aria-label", title.textContent);
      title.remove();
      mark.setAttribute("tabindex", i ? "-1" : "0");
    });
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, Home: -1e9, End: 1e9 }[event.key];
      const here = marks.indexOf(document.activeElement);
      if (!step || here < 0) return;
      event.preventDefault();
      const there = Math.min(marks.length - 1, Math.max(0, here + step));
      marks[here].setAttribute("tabindex", "-1");
      marks[there].setAttribute("tabindex", "0");
      marks[there].focus();
    });
  }

  // Navigation: mark the section in view. Not with an IntersectionObserver: it reports with frames
  // alone, and a page that is printed or captured unseen gets none.
  const links = new Map(all("#sections a").map((a) => [a.hash.slice(1), a]));
  const sections = all("main > section").filter((section) => links.has(section.id));
  const markSection = () => {
    const reached = sections.filter((section) => section.getBoundingClientRect().top < 0.4 * innerHeight);
    const atEnd = scrollY > 0 && scrollY + innerHeight > document.documentElement.scrollHeight - 2;
    const current = (atEnd ? sections : reached).at(-1) || sections[0];
    for (const [id, a] of links) {
      if (id === current.id) a.setAttribute("aria-current", "true");
      else a.removeAttribute("aria-current");
    }
  };
  if (sections.length) {
    for (const event of ["scroll", "resize"]) window.addEventListener(event, markSection, { passive: true });
    markSection();
  }

  // Latents: filter and order. A link may carry both: report.html#q=python&order=rare
  const form = document.getElementById("latents-controls");
  if (form) {
    const query = document.getElementById("latents-query");
    const order = document.getElementById("latents-order");
    const list = document.getElementById("latents-cards");
    const given = all(".card", list);
    const words = new Map(given.map((card) => [card, card.textContent.toLowerCase()]));
    const keys = {
      given: (card) => given.indexOf(card),
      number: (card) => Number(card.dataset.latent),
      frequent: (card) => -Number(card.dataset.freq),
      rare: (card) => (card.dataset.freq < 0 ? Infinity : Number(card.dataset.freq)),
    };
    const apply = () => {
      const wanted = query.value.trim().toLowerCase();
      const key = keys[order.value] || keys.given;
      let shown = 0;
      for (const card of [...given].sort((a, b) => key(a) - key(b) || keys.given(a) - keys.given(b))) {
        card.hidden = !words.get(card).includes(wanted);
        shown += card.hidden ? 0 : 1;
        for (const more of all("details", card)) {
          more.open = wanted !== "" && more.textContent.toLowerCase().includes(wanted);
        }
        list.append(card);
      }
      document.getElementById("latents-count").textContent = `${shown} of ${given.length} shown`;
      document.getElementById("latents-nothing").hidden = shown > 0;
    };
    const fromHash = () => {
      const card = given.find((one) => one.id === location.hash.slice(1));
      if (card && card.hidden) {  // a link to a card that the filter hides
        query.value = "";
        apply();
        card.scrollIntoView();
      }
      const wanted = new URLSearchParams(location.hash.slice(1));
      if (!wanted.has("q") && !wanted.has("order")) return;
      query.value = wanted.get("q") || "";
      order.value = wanted.get("order") in keys ? wanted.get("order") : "given";
      apply();
      document.getElementById("latents").scrollIntoView();
    };
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    query.addEventListener("input", apply);
    order.addEventListener("change", apply);
    window.addEventListener("hashchange", fromHash);
    apply();
    fromHash();
  }

  // Geography: a map and a scatter plot on canvases, from the JSON beside them. Text of places goes
  // through textContent alone.
  const packed = document.getElementById("geography-data");
  if (packed) {
    const data = JSON.parse(packed.textContent);
    const byId = (name) => document.getElementById(`geography-${name}`);
    const unpack = (text) => {
      const raw = atob(text);
      return Uint16Array.from({ length: raw.length / 2 }, (_, i) =>
        raw.charCodeAt(2 * i) | (raw.charCodeAt(2 * i + 1) << 8));
    };
    const scaled = (text, lo, hi) => Float64Array.from(unpack(text), (v) => lo + (v / 65535) * (hi - lo));
    const map = byId("canvas"), scatter = byId("scatter"), tip = byId("tip"), legend = byId("legend");
    const n = data.names.length, label = unpack(data.label), tall = data.aspect;
    const X = scaled(data.x, 0, 1), Y = scaled(data.y, tall, 0);
    const [land, lines] = [data.land, data.lines].map((d) => (
      { n: d.n, x: scaled(d.x, 0, 1), y: scaled(d.y, tall, 0) }));
    const [left, right, bottom, top] = data.window;
    const box = { x: left, y: tall * (1 - top), w: right - left, h: tall * (top - bottom) };
    const px = new Float64Array(n), py = new Float64Array(n), sx = new Float64Array(n), sy = new Float64Array(n);
    const STEPS = 48, MAX_ZOOM = 60, LISA_ORDER = [0, 3, 2, 4, 1];
    const at = { feature: 0, view: "value", zoom: 1, x: box.x + box.w / 2, y: box.y + box.h / 2, place: -1, walk: -1 };
    const ready = [];
    let theme;

    const feature = () => {
      if (ready[at.feature]) return ready[at.feature];
      const f = data.features[at.feature];
      const value = Float64Array.from(unpack(f.values), (c) => (c ? f.lo + ((c - 1) / 65534) * (f.hi - f.lo) : 0));
      const active = Float64Array.from(value.filter((v) => v !== 0)).sort();
      const share = (q) => active[Math.min(active.length - 1, Math.floor(q * active.length))] || 0;
      const from = f.lo < 0 ? share(0.02) : 0, to = share(0.98) > from ? share(0.98) : f.hi;
      const color = Int16Array.from(value, (v) => (v === 0 ? -1
        : Math.round((STEPS - 1) * Math.min(1, Math.max(0, (v - from) / (to - from || 1))))));
      const kind = f.lisa ? Uint8Array.from(f.lisa) : new Uint8Array(n);
      const rank = LISA_ORDER.map((_, k) => LISA_ORDER.indexOf(k));
      const index = [...value.keys()];
      const byValue = [...index].sort((a, b) => color[a] - color[b] || value[a] - value[b]);
      ready[at.feature] = {
        ...f, value, color, kind, from, to, byValue,
        byKind: [...index].sort((a, b) => rank[kind[a]] - rank[kind[b]]),
        strongest: index.filter((i) => value[i] !== 0).sort((a, b) => value[b] - value[a]),
        lags: f.lag ? scaled(f.lag, f.lagLo, f.lagHi) : null,
        counts: data.classes.map((_, k) => kind.reduce((sum, one) => sum + (one === k), 0)),
      };
      return ready[at.feature];
    };

    const readTheme = () => {
      const style = getComputedStyle(document.documentElement);
      const get = (name) => style.getPropertyValue(`--${name}`).trim();
      const stops = [0, 1, 2, 3, 4].map((k) => get(`map-${k}`).match(/[0-9a-f]{2}/gi).map((h) => parseInt(h, 16)));
      const ramp = Array.from({ length: STEPS }, (_, k) => {
        const t = (4 * k) / (STEPS - 1), a = Math.min(3, Math.floor(t));
        return `rgb(${stops[a].map((c, j) => Math.round(c + (t - a) * (stops[a + 1][j] - c)))})`;
      });
      const lisa = data.classes.map((_, k) => get(`lisa-${k}`));
      const names = ["ink", "soft", "rule", "paper", "map-land", "map-line", "map-quiet"];
      theme = { ramp, lisa, ...Object.fromEntries(names.map((name) => [name, get(name)])) };
    };
    const colorOf = (f, i) => (at.view === "lisa" ? theme.lisa[f.kind[i]]
      : f.color[i] < 0 ? theme["map-quiet"] : theme.ramp[f.color[i]]);

    const prepare = (canvas, width, height) => {
      const ratio = window.devicePixelRatio || 1;
      if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
      if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
      const pen = canvas.getContext("2d");
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      pen.clearRect(0, 0, width, height);
      return pen;
    };
    const dots = (pen, f, x, y, size, w, h) => {
      let last = null;
      for (const i of at.view === "lisa" ? f.byKind : f.byValue) {
        if (x[i] < -9 || y[i] < -9 || x[i] > w + 9 || y[i] > h + 9) continue;
        const color = colorOf(f, i), quiet = at.view === "lisa" ? f.kind[i] === 0 : f.color[i] < 0;
        const r = quiet ? size * 0.62 : size;
        if (color !== last) {
          if (last) pen.fill();
          pen.fillStyle = last = color;
          pen.beginPath();
        }
        pen.moveTo(x[i] + r, y[i]);
        pen.arc(x[i], y[i], r, 0, 2 * Math.PI);
      }
      if (last) pen.fill();
    };
    const ring = (pen, x, y, r) => {
      for (const [color, width] of [[theme.paper, 5], [theme.ink, 2]]) {
        pen.strokeStyle = color;
        pen.lineWidth = width;
        pen.beginPath();
        pen.arc(x, y, r, 0, 2 * Math.PI);
        pen.stroke();
      }
    };

    const size = { w: 0, h: 0, scale: 1 };
    const measure = () => {
      size.w = map.clientWidth;
      size.h = Math.round(Math.min(Math.max(size.w * (box.h / box.w), 300), 640, Math.max(300, 0.8 * innerHeight)));
      map.style.height = `${size.h}px`;
    };
    const drawMap = () => {
      const { w, h } = size, pen = prepare(map, w, h), f = feature();
      const scale = (size.scale = Math.min(w / box.w, h / box.h) * at.zoom);
      const toX = (x) => (x - at.x) * scale + w / 2, toY = (y) => (y - at.y) * scale + h / 2;
      pen.strokeStyle = theme["map-line"];
      pen.lineWidth = at.zoom > 4 ? 1.2 : 0.8;
      pen.lineJoin = "round";
      const trace = (shape) => {
        pen.beginPath();
        let k = 0;
        for (const length of shape.n) {
          pen.moveTo(toX(shape.x[k]), toY(shape.y[k]));
          for (const end = k++ + length; k < end; k++) pen.lineTo(toX(shape.x[k]), toY(shape.y[k]));
        }
      };
      pen.fillStyle = theme["map-land"];
      trace(land);
      pen.fill();
      trace(lines);
      pen.stroke();
      for (let i = 0; i < n; i++) (px[i] = toX(X[i])), (py[i] = toY(Y[i]));
      const each = Math.sqrt((w * h) / n) * 0.24 * Math.pow(at.zoom, 0.4);
      size.dot = Math.min(Math.max(each, 1.5), 6);
      dots(pen, f, px, py, size.dot, w, h);
      if (at.place >= 0) ring(pen, px[at.place], py[at.place], size.dot + 3);
    };

    const drawScatter = () => {
      const f = feature();
      if (!scatter || !f.lags) return;
      const w = scatter.clientWidth, h = Math.round(Math.min(w, 300));
      scatter.style.height = `${h}px`;
      const pen = prepare(scatter, w, h), pad = { l: 34, r: 10, t: 10, b: 32 };
      const z = (v) => (v - f.mean) / f.sd;
      const wide = (lo, hi) => [Math.min(lo, -0.5) - 0.04 * (hi - lo), Math.max(hi, 0.5) + 0.04 * (hi - lo)];
      const [x0, x1] = wide(z(Math.min(0, f.lo)), z(f.hi)), [y0, y1] = wide(f.lagLo, f.lagHi);
      const toX = (v) => pad.l + ((v - x0) / (x1 - x0)) * (w - pad.l - pad.r);
      const toY = (v) => h - pad.b - ((v - y0) / (y1 - y0)) * (h - pad.t - pad.b);
      const write = (text, x, y, align, color = theme.soft) => {
        pen.fillStyle = color;
        pen.textAlign = align;
        pen.fillText(text, x, y);
      };
      const line = (color, width, ...ends) => {
        pen.strokeStyle = color;
        pen.lineWidth = width;
        pen.beginPath();
        pen.moveTo(ends[0], ends[1]);
        pen.lineTo(ends[2], ends[3]);
        pen.stroke();
      };
      line(theme.rule, 1, toX(0), pad.t, toX(0), h - pad.b);
      line(theme.rule, 1, pad.l, toY(0), w - pad.r, toY(0));
      pen.font = `11px ${getComputedStyle(scatter).fontFamily}`;
      const step = (lo, hi) => [1, 2, 5, 10, 20, 50, 100].find((s) => (hi - lo) / s <= 6) || 200;
      for (let v = Math.ceil(x0 / step(x0, x1)) * step(x0, x1); v <= x1; v += step(x0, x1)) {
        write(String(v).replace("-", "\u2212"), toX(v), h - pad.b + 14, "center");
      }
      for (let v = Math.ceil(y0 / step(y0, y1)) * step(y0, y1); v <= y1; v += step(y0, y1)) {
        write(String(v).replace("-", "\u2212"), pad.l - 6, toY(v) + 4, "right");
      }
      write("value at the place", w - pad.r, h - 3, "right");
      for (let i = 0; i < n; i++) (sx[i] = toX(z(f.value[i]))), (sy[i] = toY(f.lags[i]));
      dots(pen, f, sx, sy, Math.min(Math.max(40 / Math.sqrt(n), 1.6), 4), w, h);
      pen.save();
      pen.beginPath();
      pen.rect(pad.l, pad.t, w - pad.l - pad.r, h - pad.t - pad.b);
      pen.clip();
      line(theme.ink, 1.5, toX(x0), toY(f.I * x0), toX(x1), toY(f.I * x1));
      pen.restore();
      pen.lineWidth = 4;
      pen.strokeStyle = theme.paper;
      pen.textAlign = "left";
      pen.strokeText("mean of its neighbours", pad.l + 2, pad.t + 8);
      write("mean of its neighbours", pad.l + 2, pad.t + 8, "left");
      if (at.place >= 0) ring(pen, sx[at.place], sy[at.place], 5);
    };

    const element = (kind, text = "", name = "") => {
      const made = document.createElement(kind);
      made.textContent = text;
      if (name) made.className = name;
      return made;
    };
    const shown = (v) => (v === 0 ? "0" : Math.abs(v) >= 1e-3 && Math.abs(v) < 1e6
      ? v.toLocaleString("en", { maximumSignificantDigits: 3 }) : v.toExponential(1)).replace("-", "\u2212");
    const drawLegend = () => {
      const f = feature(), parts = [];
      const key = (color, text) => {
        const item = element("span", "", "geo-key"), swatch = element("i");
        swatch.style.background = color;
        item.append(swatch, text);
        parts.push(item);
      };
      if (at.view === "lisa") {
        for (const k of [1, 3, 4, 2, 0]) key(theme.lisa[k], `${data.classes[k]} ${f.counts[k].toLocaleString("en")}`);
      } else {
        const bar = element("span", "", "geo-key");
        bar.append(shown(f.from), element("b", "", "geo-ramp"), (f.to < f.hi ? "\u2265 " : "") + shown(f.to));
        parts.push(bar);
        const silent = n - f.strongest.length;
        if (silent) key(theme["map-quiet"], `silent ${silent.toLocaleString("en")}`);
      }
      legend.replaceChildren(...parts);
    };

    const drawTop = () => {
      const f = feature();
      byId("top").replaceChildren(...f.strongest.slice(0, 8).map((i) => {
        const item = element("li"), button = element("button", data.names[i]);
        button.type = "button";
        if (label[i]) button.append(" ", element("small", data.labels[label[i] - 1]));
        for (const event of ["pointerenter", "focus", "click"]) button.addEventListener(event, () => reveal(i));
        for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => point(-1));
        item.append(button, element("span", shown(f.value[i])));
        return item;
      }));
    };

    const drawTip = () => {
      const i = at.place, f = feature();
      tip.hidden = i < 0;
      if (i < 0) return;
      const place = label[i] ? `${data.labels[label[i] - 1]}` : "";
      tip.replaceChildren(element("b", data.names[i]), element("span", place),
        element("span", f.value[i] === 0 ? "silent here" : `value ${shown(f.value[i])}`),
        element("span", f.lisa ? data.classes[f.kind[i]] : ""));
      const x = Math.min(Math.max(px[i], 0), size.w), y = Math.min(Math.max(py[i], 0), size.h);
      const gap = size.dot + 8, over = x + gap + tip.offsetWidth > size.w;
      tip.style.left = `${Math.max(0, over ? x - gap - tip.offsetWidth : x + gap)}px`;
      tip.style.top = `${Math.min(Math.max(0, y - tip.offsetHeight / 2), size.h - tip.offsetHeight)}px`;
    };
    let asked = 0;
    const draw = () => {
      // not requestAnimationFrame: a page that is printed or captured unseen gets no frames
      asked = asked || setTimeout(() => {
        asked = 0;
        if (!size.w) return;
        drawMap();
        drawScatter();
        drawTip();
      });
    };
    const refresh = () => {
      readTheme();
      drawLegend();
      drawTop();
      const f = feature();
      map.setAttribute("aria-label", `Map of ${f.title}, ${at.view === "lisa" ? "local clusters" : "values"}`);
      if (scatter) scatter.setAttribute("aria-label", `Moran scatter plot of ${f.title}, slope ${shown(f.I)}`);
      if (scatter) scatter.parentElement.hidden = !f.lags;
      draw();
    };

    const choose = (k) => {
      at.feature = k;
      at.walk = -1;
      for (const row of all(".geo-list tbody tr")) {
        const radio = row.querySelector("input");
        const is = radio !== null && Number(radio.value) === k;
        row.classList.toggle("is-chosen", is);
        if (is) radio.checked = true;
      }
      refresh();
    };
    const point = (i) => {
      if (i === at.place) return;
      at.place = i;
      draw();
    };
    const nearest = (x, y, xs, ys, reach) => {
      let best = reach * reach, found = -1;
      for (let i = 0; i < n; i++) {
        const d = (xs[i] - x) ** 2 + (ys[i] - y) ** 2;
        if (d < best) (best = d), (found = i);
      }
      return found;
    };
    const hold = () => {
      at.x = Math.min(Math.max(at.x, box.x), box.x + box.w);
      at.y = Math.min(Math.max(at.y, box.y), box.y + box.h);
      if (at.zoom === 1) (at.x = box.x + box.w / 2), (at.y = box.y + box.h / 2);
      map.style.touchAction = at.zoom === 1 ? "pan-y" : "none";
      draw();
    };
    const zoomAt = (factor, x = size.w / 2, y = size.h / 2) => {
      const zoom = Math.min(MAX_ZOOM, Math.max(1, at.zoom * factor)), more = zoom / at.zoom;
      const fit = size.scale / at.zoom;
      at.x += ((x - size.w / 2) / (fit * at.zoom)) * (1 - 1 / more);
      at.y += ((y - size.h / 2) / (fit * at.zoom)) * (1 - 1 / more);
      at.zoom = zoom;
      size.scale = fit * zoom;
      hold();
    };
    const reveal = (i) => {
      const dx = Math.abs(X[i] - at.x) * size.scale, dy = Math.abs(Y[i] - at.y) * size.scale;
      if (dx > size.w / 2 - 8 || dy > size.h / 2 - 8) (at.x = X[i]), (at.y = Y[i]);
      hold();
      point(i);
    };

    const fingers = new Map();
    let moved = 0;
    const local = (event) => [event.offsetX, event.offsetY];
    map.addEventListener("pointerdown", (event) => {
      fingers.set(event.pointerId, local(event));
      moved = 0;
    });
    map.addEventListener("pointermove", (event) => {
      const before = fingers.get(event.pointerId), now = local(event);
      if (!before) return point(nearest(...now, px, py, 14));
      const other = [...fingers].find(([id]) => id !== event.pointerId);
      const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
      moved += Math.abs(dx) + Math.abs(dy);
      if (moved < 4) return;
      fingers.set(event.pointerId, now);
      if (other) {
        const far = (a) => Math.hypot(a[0] - other[1][0], a[1] - other[1][1]) || 1;
        return zoomAt(far(now) / far(before), (now[0] + other[1][0]) / 2, (now[1] + other[1][1]) / 2);
      }
      if (!map.hasPointerCapture(event.pointerId)) map.setPointerCapture(event.pointerId);
      at.x -= dx / size.scale;
      at.y -= dy / size.scale;
      hold();
    });
    map.addEventListener("pointerup", (event) => {
      if (moved < 4) point(nearest(...local(event), px, py, event.pointerType === "touch" ? 24 : 14));
      fingers.delete(event.pointerId);
    });
    map.addEventListener("pointercancel", (event) => fingers.delete(event.pointerId));
    map.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "touch" && !fingers.size) point(-1);
    });
    map.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && document.activeElement !== map) return;
      if (event.deltaY > 0 && at.zoom === 1) return;
      event.preventDefault();
      zoomAt(Math.exp(-event.deltaY / 300), ...local(event));
    }, { passive: false });
    map.addEventListener("keydown", (event) => {
      const order = feature().strongest, step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "+" || event.key === "=") zoomAt(1.6);
      else if (event.key === "-") zoomAt(1 / 1.6);
      else if (event.key === "Escape") point(-1);
      else if (step && order.length) {
        at.walk = Math.min(order.length - 1, Math.max(0, at.walk + step));
        reveal(order[at.walk]);
      } else return;
      event.preventDefault();
    });
    map.addEventListener("blur", () => point(-1));
    if (scatter) {
      scatter.addEventListener("pointermove", (event) => point(nearest(...local(event), sx, sy, 12)));
      scatter.addEventListener("pointerleave", () => point(-1));
    }
    for (const button of all("[data-zoom]")) {
      button.addEventListener("click", () => zoomAt({ in: 1.6, out: 1 / 1.6, all: 0 }[button.dataset.zoom]));
    }
    for (const radio of all('input[name="geography-view"]')) {
      radio.addEventListener("change", () => {
        at.view = radio.value;
        refresh();
      });
    }
    for (const radio of all('input[name="geography-feature"]')) {
      radio.hidden = false;
      radio.addEventListener("change", () => choose(Number(radio.value)));
      radio.closest("tr").addEventListener("click", () => choose(Number(radio.value)));
    }
    const lower = data.names.map((name) => name.toLowerCase());
    byId("find").addEventListener("input", (event) => {
      const wanted = event.target.value.trim().toLowerCase();
      const starts = lower.findIndex((name) => name.startsWith(wanted));
      const found = wanted ? (starts >= 0 ? starts : lower.findIndex((name) => name.includes(wanted))) : -1;
      found < 0 ? point(-1) : reveal(found);
    });
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);
    byId("live").hidden = false;
    byId("map").classList.add("is-live");
    new ResizeObserver(() => {
      measure();
      draw();
    }).observe(map.parentElement);
    // A link may name a feature by its place in the list: report.html#feature=2&view=lisa
    const follow = () => {
      const wanted = new URLSearchParams(location.hash.slice(1));
      const k = Number(wanted.get("feature") || 1) - 1, view = wanted.get("view");
      const radio = all('input[name="geography-view"]').find((one) => one.value === view);
      if (radio) (radio.checked = true), (at.view = view);
      choose(k in data.features ? k : 0);
      if (wanted.has("feature") || radio) byId("live").scrollIntoView();
    };
    window.addEventListener("hashchange", follow);
    measure();
    hold();
    follow();
  }
})();
