// Image files that a page takes: chosen, dropped or pasted, and resized where they are too large.

const MAX_FILES = 20; // of one call
const MAX_CALL_BYTES = 8 * 2 ** 20;
const MAX_SIDE = 2048; // pixels of an image that had to be resized; models need far fewer

const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");

/**
 * Give the files that a reader chooses, drops or pastes to a function.
 *
 * `zone` has the file input and is marked while files are over `area`, where they can be dropped.
 */
export function acceptFiles(zone, onFiles, { area = zone, takesPaste = false } = {}) {
  const input = zone.querySelector("input[type=file]");
  input.addEventListener("change", () => {
    onFiles([...input.files]);
    input.value = "";
  });
  let dragDepth = 0; // dragenter and dragleave are also fired for the elements inside
  area.addEventListener("dragenter", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    dragDepth += 1;
    zone.classList.add("drag-over");
  });
  area.addEventListener("dragleave", () => {
    dragDepth = Math.max(0, dragDepth - 1);
    if (!dragDepth) zone.classList.remove("drag-over");
  });
  area.addEventListener("drop", (event) => {
    dragDepth = 0;
    zone.classList.remove("drag-over");
    if (hasFiles(event)) onFiles([...event.dataTransfer.files]);
  });
  if (takesPaste) {
    addEventListener("paste", (event) => {
      if (event.clipboardData?.files.length) onFiles([...event.clipboardData.files]);
    });
  }
}

// Everywhere: the browser would open a dropped image instead of the page.
for (const kind of ["dragover", "drop"]) {
  addEventListener(kind, (event) => {
    if (hasFiles(event)) event.preventDefault();
  });
}

/** Resize an image whose file is larger than the server accepts, as photos of phones often are. */
export async function resizeIfTooLarge(file, maxBytes) {
  if (file.size <= maxBytes) return file;
  try {
    const image = await createImageBitmap(file);
    for (let side = MAX_SIDE; side >= 512; side /= 2) {
      const scale = Math.min(1, side / Math.max(image.width, image.height));
      const canvas = document.createElement("canvas");
      canvas.width = Math.max(1, Math.round(image.width * scale));
      canvas.height = Math.max(1, Math.round(image.height * scale));
      const context = canvas.getContext("2d");
      context.fillStyle = "#fff"; // the server replaces transparency by white too
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
      if (blob && blob.size <= maxBytes) return blob;
    }
  } catch {
    return file; // not an image that this browser can decode; the server's error explains why
  }
  return file;
}

/** Divide files into those of one call each, at most `maxBytes` of each file. */
export function divide(files, maxBytes) {
  const calls = [];
  let bytes = 0;
  for (const file of files) {
    if (!calls.length || calls.at(-1).length >= MAX_FILES || bytes + file.size > MAX_CALL_BYTES) {
      calls.push([]);
      bytes = 0;
    }
    calls.at(-1).push(file);
    bytes += Math.min(file.size, maxBytes);
  }
  return calls;
}
