"use strict";
// Turn the Markdown of a model's answer into elements. All text is set by textContent, so nothing that a model writes is
// parsed as HTML. Only http and https links become links.

const LIMIT = 20000; // characters that are laid out; a longer answer stays plain text, since the patterns take the square of the time

function inline(parent, text) {
  const pattern = /(`+)([^`]|[^`].*?[^`])\1(?!`)|\*\*(?=\S)(.+?)(?<=\S)\*\*|(?<![\w*])\*(?=\S)([^*]+?)(?<=\S)\*(?![\w*])|(?<!\w)_(?=\S)([^_]+?)(?<=\S)_(?!\w)|\[([^\]]+)\]\((https?:\/\/[^\s()]+)\)/s;
  let rest = text;
  for (let found = rest.match(pattern); found; found = rest.match(pattern)) {
    parent.append(rest.slice(0, found.index));
    const [whole, , code, bold, star, underscore, label, address] = found;
    if (code !== undefined) {
      const made = document.createElement("code");
      made.textContent = code;
      parent.append(made);
    } else if (address !== undefined) {
      const link = document.createElement("a");
      link.textContent = label;
      link.href = address;
      link.target = "_blank";
      link.rel = "noopener noreferrer";
      parent.append(link);
    } else {
      const made = document.createElement(bold !== undefined ? "strong" : "em");
      inline(made, bold ?? star ?? underscore);
      parent.append(made);
    }
    rest = rest.slice(found.index + whole.length);
  }
  parent.append(rest);
}

function codeBlock(lines, language) {
  const box = document.createElement("pre");
  const code = document.createElement("code");
  code.textContent = lines.join("\n");
  if (language) box.dataset.language = language;
  box.append(code);
  return box;
}

function list(lines, ordered) {
  const box = document.createElement(ordered ? "ol" : "ul");
  if (ordered) box.start = parseInt(lines[0], 10) || 1;
  for (const line of lines) {
    const entry = document.createElement("li");
    inline(entry, line.replace(/^\s*(?:[-*+]|\d+[.)])\s+/, ""));
    box.append(entry);
  }
  return box;
}

function block(tag, text) {
  const made = document.createElement(tag);
  inline(made, text);
  return made;
}

/* Put a text into an element, laid out as Markdown. */
function markdown(parent, text) {
  if (text.length > LIMIT) {
    parent.replaceChildren(text);
    return;
  }
  const lines = text.split("\n"), made = [];
  const bullet = /^\s*[-*+]\s+\S/, number = /^\s*\d+[.)]\s+\S/, fence = /^\s*(```+|~~~+)\s*([\w+#.-]*)\s*$/, heading = /^(#{1,6})\s+(\S.*)$/;
  const special = (line) => bullet.test(line) || number.test(line) || fence.test(line) || heading.test(line);
  for (let at = 0; at < lines.length; ) {
    const line = lines[at], opened = line.match(fence), titled = line.match(heading);
    let end = at + 1;
    if (opened) {
      while (end < lines.length && !lines[end].trim().startsWith(opened[1])) end += 1;
      made.push(codeBlock(lines.slice(at + 1, end), opened[2]));
      end += 1;
    } else if (titled) {
      made.push(block(`h${Math.min(6, titled[1].length + 2)}`, titled[2]));
    } else if (bullet.test(line) || number.test(line)) {
      const kind = bullet.test(line) ? bullet : number;
      while (end < lines.length && kind.test(lines[end])) end += 1;
      made.push(list(lines.slice(at, end), kind === number));
    } else if (line.trim()) {
      while (end < lines.length && lines[end].trim() && !special(lines[end])) end += 1;
      made.push(block("p", lines.slice(at, end).join("\n")));
    }
    at = end;
  }
  parent.replaceChildren(...made);
}
