// What is wrong with a page, in both themes: its width, letters of too little contrast, pictures without a description.
const channels = (colour) => {
  const [r, g, b, alpha = 1] = colour.match(/[\d.]+/g).map(Number);
  const scale = colour.startsWith("color(") ? 255 : 1;
  return [r * scale, g * scale, b * scale, alpha];
};
const over = ([r, g, b, alpha], [R, G, B]) => [r, g, b].map((c, i) => c * alpha + [R, G, B][i] * (1 - alpha));
const light = (colour) => {
  const [r, g, b] = colour.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (one, two) => {
  const [low, high] = [light(one), light(two)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
function behind(view, element) {
  const layers = [];
  for (let e = element; e; e = e.parentElement) {
    const colour = channels(view.getComputedStyle(e).backgroundColor);
    layers.push(colour);
    if (colour[3] === 1) break;
  }
  return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
}
function faint(view, theme) {
  const page = view.document, found = new Set();
  page.documentElement.dataset.theme = theme;
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    const style = view.getComputedStyle(element), box = element.getBoundingClientRect();
    if (!text || !box.width || !box.height || style.visibility === "hidden" || element.closest("script, style, noscript")) continue;
    const ground = behind(view, element), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const ratio = contrast(over(channels(style.color), ground), ground);
    if (ratio < (large ? 3 : 4.5)) found.add(`${theme}: contrast ${ratio.toFixed(2)} of "${text.slice(0, 30)}" in ${element.tagName}.${element.className}`);
  }
  return [...found];
}
function looked(view) {
  const all = view.document.documentElement;
  const style = view.document.createElement("style");
  style.textContent = "* { transition: none !important; }";  // colours would be those in between
  view.document.head.append(style);
  const pictures = [...view.document.images].filter((image) => (image.getAttribute("alt") ?? "").length < 10);
  return { width: all.scrollWidth, letters: view.document.body.innerText.length, faint: ["light", "dark"].flatMap((theme) => faint(view, theme)),
    undescribed: pictures.map((image) => `no description of ${image.getAttribute("src")}`) };
}
