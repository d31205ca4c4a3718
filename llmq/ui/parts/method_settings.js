// Draws the fields of the methods named in `props.value.methods`, and spells a name anew when one of them changes.
const drawn = []; // what stands in each row, so that a field keeps its focus while it is used

const parsed = (name) => {
  const [base, settings = ""] = name.split(/@(.*)/s);
  const fields = props.known[base]?.fields || [];
  const values = Object.fromEntries(fields.map((field) => [field.name, field.usual]));
  const others = [];
  settings.split(":").filter(Boolean).forEach((setting, index) => {
    const [key, value] = setting.includes("=") ? setting.split(/=(.*)/s) : [fields.find((f) => f.bare)?.name, setting];
    if (key in values) values[key] = value;
    else others.push(index === 0 ? setting : `${key}=${value}`);
  });
  return { base, fields, values, others };
};

const spelled = ({ base, fields, values, others }) => {
  const said = fields.filter((f) => values[f.name] !== f.usual).map((f) => `${f.name}=${values[f.name]}`);
  const settings = [...others, ...said].join(":");
  return settings ? `${base}@${settings}` : base;
};

const control = (field, id) => {
  if (field.kind === "choice") {
    return node("select", { id }, ...field.choices.map(([label, value]) => node("option", { value }, label)));
  }
  if (field.kind === "switch") return node("input", { id, type: "checkbox" });
  const { low, high, step } = field;
  return node("input", field.kind === "number" ? { id, type: "number", min: low, max: high, step } : { id, type: "text" });
};

const show = (input, field, value) => {
  if (field.kind === "switch") input.checked = value === "on" || value === "true";
  else if (document.activeElement !== input) input.value = value;
};

const said = (input, field) => (field.kind === "switch" ? (input.checked ? "on" : "off") : input.value.trim());

const change = (index, field, input) => {
  if (!input.reportValidity() || said(input, field) === "") return;
  const names = [...props.value.methods];
  const method = parsed(names[index]);
  method.values[field.name] = said(input, field);
  names[index] = spelled(method);
  props.value = { methods: names };
  trigger("submit");
};

const row = (name, index) => {
  const { base, fields } = parsed(name);
  const legend = node("legend", {}, props.known[base].label);
  const set = node("fieldset", { "data-method": base }, legend);
  const inputs = fields.map((field) => {
    const id = `method-settings-${index}-${field.name}`;
    const input = control(field, id);
    input.title = field.help;
    input.addEventListener("change", () => change(index, field, input));
    set.append(node("label", { for: id }, node("span", {}, field.label), input));
    return input;
  });
  return { base, set, inputs };
};

const draw = () => {
  const names = props.value.methods.map((name) => name || "");
  names.forEach((name, index) => {
    const method = parsed(name);
    if (drawn[index]?.base !== method.base) {
      drawn[index]?.set?.remove();
      drawn[index] = method.fields.length ? row(name, index) : { base: method.base };
      const next = drawn.slice(index + 1).find((other) => other?.set)?.set || null;
      if (drawn[index].set) part("rows").insertBefore(drawn[index].set, next);
    }
    method.fields.forEach((field, at) => show(drawn[index].inputs[at], field, method.values[field.name]));
  });
};

watch("value", draw);
draw();
