// The form that sends the examples of a training: drop a file, and see how much of it was sent. Works without this script.

const form = document.getElementById("upload");

if (form) {
  const dropZone = document.getElementById("drop");
  const input = document.getElementById("archive");
  const sending = document.getElementById("sending");
  const [bar, text] = sending.children;

  addEventListener("dragover", (event) => {
    event.preventDefault();
    dropZone.classList.add("drag-over");
  });
  addEventListener("dragleave", () => dropZone.classList.remove("drag-over"));
  addEventListener("drop", (event) => {
    event.preventDefault(); // the browser would open the file instead of the page
    dropZone.classList.remove("drag-over");
    if (event.dataTransfer.files.length) {
      input.files = event.dataTransfer.files;
      form.requestSubmit();
    }
  });

  input.addEventListener("change", () => form.requestSubmit());
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const file = input.files[0];
    if (file.size > Number(form.dataset.maxBytes)) {
      sending.hidden = false;
      text.textContent = "The file is too large.";
      return;
    }
    const request = new XMLHttpRequest(); // fetch does not tell how much was sent
    request.open("POST", form.action);
    request.setRequestHeader("Accept", "text/html");
    request.upload.addEventListener("progress", ({ loaded, total }) => {
      bar.value = loaded / total;
      text.textContent = loaded < total ? `${Math.round((100 * loaded) / total)} % sent` : "Checking …";
    });
    request.addEventListener("load", () => {
      // After a redirect this is the page of the training, else this page with the reason.
      if (new URL(request.responseURL).pathname.startsWith("/ui/train/new/")) {
        const page = new DOMParser().parseFromString(request.responseText, "text/html");
        text.textContent = page.querySelector("main [role=alert]")?.textContent ?? "The file was refused.";
        bar.value = 0;
      } else {
        location.assign(request.responseURL);
      }
    });
    request.addEventListener("error", () => { text.textContent = "The connection broke. Send the file again."; });
    sending.hidden = false;
    request.send(new FormData(form));
  });
}
