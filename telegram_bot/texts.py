"""What the bot says, in each of its languages.

A sentence is found by its name; all languages have the same ones, with the same values in them.
"""

from __future__ import annotations

DEFAULT_LANGUAGE = "en"
#: Code -> how the language calls itself.
LANGUAGES = {"en": "English", "de": "Deutsch", "es": "Español", "fr": "Français"}

_ENGLISH = {
    "welcome": (
        "Send me a photo, and a model tells you what is on it. Several photos together are answered together.\n\n"
        "/models – the model for all your photos, or a question each time\n"
        "/style – the photo whose style other photos get\n"
        "/status – what is waiting, and what is left today\n"
        "/cancel – stop what is waiting\n"
        "/language – another language"
    ),
    "not_allowed": "This bot is not open to everybody. Its operator can let you in: your number is {id}.",
    "send_photo": "I can only use photos. Send one, or see /help.",
    "choose": "Which model?",
    "choose_many": "Photos: {count}. Which model?",
    "choose_service": "What shall I do with it?",
    "no_models": "The server does not name its models at the moment. The menu follows as soon as it does.",
    "model_gone": "This model is no longer there. Choose another one.",
    "sending": "Sending …",
    "server_down": "The server does not answer at the moment. Your photo is kept here and sent when it does.",
    "queued": "Queued.",
    "queued_for": "Queued, about {time}.",
    "working": "In progress.",
    "working_part": "In progress: {percent} %.",
    "answered_of": "Answered: {done} of {count}.",
    "cancelled": "Cancelled.",
    "cancelling": "Cancelling …",
    "too_late": "It is being worked on already, so the answer will come.",
    "expired": "You chose nothing, so this photo was put aside. Send it again.",
    "refused": "The server cannot use it: {reason}",
    "failed": "It failed: {reason}",
    "gave_up": "The server did not answer for a day. Send the photo again.",
    "server_quota": "The server takes no more photos today: {reason}",
    "quota": "You may send {count} photos a day, and today's are used up. The next day begins at midnight UTC.",
    "too_many": "Too much is waiting in this chat. Wait for answers, or use /cancel.",
    "too_large": "This file is too large. I can fetch at most {size} MB.",
    "file_lost": "Telegram no longer has this photo. Send it again.",
    "answer_lost": "The server no longer has the result. Send the photo again.",
    "unknown": "None of the model's classes is likely.",
    "style_ask": "Send the photo whose style the next ones shall get.",
    "style_set": "A style is set. To replace it, send a photo now.",
    "style_saved": "This is your style from now on.",
    "style_removed": "The style is removed.",
    "style_needed": "This model needs a style. Send the photo whose style it shall take.",
    "model_question": "Which model for all your photos?",
    "model_set": "From now on: {model}.",
    "model_each_time": "From now on I ask for each photo.",
    "status_none": "Nothing is waiting.",
    "status_left": "Left today: {count}.",
    "status_choosing": "waits for your choice",
    "cancel_none": "There is nothing to cancel.",
    "language_question": "Which language?",
    "language_set": "I speak English now.",
    "old_button": "This button is out of date.",
    "button_cancel": "Cancel",
    "button_back": "Back",
    "button_ask": "Ask each time",
    "button_remove": "Remove the style",
    "button_again": "Another model",
}
_GERMAN = {
    "welcome": (
        "Schick mir ein Foto, und ein Modell sagt dir, was darauf ist. Mehrere Fotos auf einmal werden zusammen "
        "beantwortet.\n\n"
        "/models – das Modell für alle deine Fotos, oder jedes Mal eine Frage\n"
        "/style – das Foto, dessen Stil andere Fotos bekommen\n"
        "/status – was noch wartet und was heute übrig ist\n"
        "/cancel – abbrechen, was noch wartet\n"
        "/language – eine andere Sprache"
    ),
    "not_allowed": "Dieser Bot ist nicht für alle offen. Der Betreiber kann dich zulassen: Deine Nummer ist {id}.",
    "send_photo": "Ich kann nur Fotos verwenden. Schick eines, oder sieh dir /help an.",
    "choose": "Welches Modell?",
    "choose_many": "Fotos: {count}. Welches Modell?",
    "choose_service": "Was soll ich damit machen?",
    "no_models": "Der Server nennt gerade keine Modelle. Das Menü folgt, sobald er es tut.",
    "model_gone": "Dieses Modell gibt es nicht mehr. Wähle ein anderes.",
    "sending": "Wird gesendet …",
    "server_down": "Der Server antwortet gerade nicht. Dein Foto bleibt hier und wird gesendet, sobald er antwortet.",
    "queued": "Eingereiht.",
    "queued_for": "Eingereiht, etwa {time}.",
    "working": "In Arbeit.",
    "working_part": "In Arbeit: {percent} %.",
    "answered_of": "Beantwortet: {done} von {count}.",
    "cancelled": "Abgebrochen.",
    "cancelling": "Wird abgebrochen …",
    "too_late": "Daran wird schon gearbeitet, die Antwort kommt also noch.",
    "expired": "Du hast nichts gewählt, darum wurde dieses Foto beiseitegelegt. Schick es noch einmal.",
    "refused": "Der Server kann es nicht verwenden: {reason}",
    "failed": "Das ging schief: {reason}",
    "gave_up": "Der Server hat einen Tag lang nicht geantwortet. Schick das Foto noch einmal.",
    "server_quota": "Der Server nimmt heute keine Fotos mehr an: {reason}",
    "quota": "Du darfst {count} Fotos am Tag senden, und die von heute sind aufgebraucht. Der nächste Tag beginnt um "
    "Mitternacht UTC.",
    "too_many": "In diesem Chat wartet zu viel. Warte auf Antworten, oder nimm /cancel.",
    "too_large": "Diese Datei ist zu groß. Ich kann höchstens {size} MB abholen.",
    "file_lost": "Telegram hat dieses Foto nicht mehr. Schick es noch einmal.",
    "answer_lost": "Der Server hat das Ergebnis nicht mehr. Schick das Foto noch einmal.",
    "unknown": "Keine Klasse des Modells ist wahrscheinlich.",
    "style_ask": "Schick das Foto, dessen Stil die nächsten bekommen sollen.",
    "style_set": "Ein Stil ist eingestellt. Um ihn zu ersetzen, schick jetzt ein Foto.",
    "style_saved": "Das ist von jetzt an dein Stil.",
    "style_removed": "Der Stil ist entfernt.",
    "style_needed": "Dieses Modell braucht einen Stil. Schick das Foto, dessen Stil es nehmen soll.",
    "model_question": "Welches Modell für alle deine Fotos?",
    "model_set": "Von jetzt an: {model}.",
    "model_each_time": "Von jetzt an frage ich bei jedem Foto.",
    "status_none": "Es wartet nichts.",
    "status_left": "Heute übrig: {count}.",
    "status_choosing": "wartet auf deine Wahl",
    "cancel_none": "Es gibt nichts abzubrechen.",
    "language_question": "Welche Sprache?",
    "language_set": "Ich spreche jetzt Deutsch.",
    "old_button": "Dieser Knopf ist veraltet.",
    "button_cancel": "Abbrechen",
    "button_back": "Zurück",
    "button_ask": "Jedes Mal fragen",
    "button_remove": "Stil entfernen",
    "button_again": "Anderes Modell",
}
_SPANISH = {
    "welcome": (
        "Envíame una foto y un modelo te dirá qué hay en ella. Varias fotos enviadas juntas se responden juntas.\n\n"
        "/models – el modelo para todas tus fotos, o una pregunta cada vez\n"
        "/style – la foto cuyo estilo tendrán las demás\n"
        "/status – lo que está en espera y lo que queda hoy\n"
        "/cancel – cancelar lo que está en espera\n"
        "/language – otro idioma"
    ),
    "not_allowed": "Este bot no está abierto a todos. Su operador puede darte acceso: tu número es {id}.",
    "send_photo": "Solo puedo usar fotos. Envía una o mira /help.",
    "choose": "¿Qué modelo?",
    "choose_many": "Fotos: {count}. ¿Qué modelo?",
    "choose_service": "¿Qué hago con ella?",
    "no_models": "El servidor no indica sus modelos en este momento. El menú llegará en cuanto lo haga.",
    "model_gone": "Este modelo ya no existe. Elige otro.",
    "sending": "Enviando…",
    "server_down": "El servidor no responde en este momento. Tu foto se guarda aquí y se enviará cuando responda.",
    "queued": "En cola.",
    "queued_for": "En cola, unos {time}.",
    "working": "En proceso.",
    "working_part": "En proceso: {percent} %.",
    "answered_of": "Respondidas: {done} de {count}.",
    "cancelled": "Cancelado.",
    "cancelling": "Cancelando…",
    "too_late": "Ya se está procesando, así que la respuesta llegará.",
    "expired": "No elegiste nada, así que esta foto se descartó. Envíala otra vez.",
    "refused": "El servidor no puede usarla: {reason}",
    "failed": "Ha fallado: {reason}",
    "gave_up": "El servidor no respondió durante un día. Envía la foto otra vez.",
    "server_quota": "El servidor no acepta más fotos hoy: {reason}",
    "quota": "Puedes enviar {count} fotos al día y ya has usado las de hoy. El día siguiente empieza a medianoche UTC.",
    "too_many": "Hay demasiadas cosas en espera en este chat. Espera las respuestas o usa /cancel.",
    "too_large": "Este archivo es demasiado grande. Puedo descargar {size} MB como máximo.",
    "file_lost": "Telegram ya no tiene esta foto. Envíala otra vez.",
    "answer_lost": "El servidor ya no tiene el resultado. Envía la foto otra vez.",
    "unknown": "Ninguna clase del modelo es probable.",
    "style_ask": "Envía la foto cuyo estilo tendrán las siguientes.",
    "style_set": "Hay un estilo elegido. Para cambiarlo, envía ahora una foto.",
    "style_saved": "Este es tu estilo a partir de ahora.",
    "style_removed": "El estilo se ha quitado.",
    "style_needed": "Este modelo necesita un estilo. Envía la foto cuyo estilo debe tomar.",
    "model_question": "¿Qué modelo para todas tus fotos?",
    "model_set": "A partir de ahora: {model}.",
    "model_each_time": "A partir de ahora preguntaré con cada foto.",
    "status_none": "No hay nada en espera.",
    "status_left": "Quedan hoy: {count}.",
    "status_choosing": "espera tu elección",
    "cancel_none": "No hay nada que cancelar.",
    "language_question": "¿Qué idioma?",
    "language_set": "Ahora hablo español.",
    "old_button": "Este botón ya no es válido.",
    "button_cancel": "Cancelar",
    "button_back": "Atrás",
    "button_ask": "Preguntar cada vez",
    "button_remove": "Quitar el estilo",
    "button_again": "Otro modelo",
}
_FRENCH = {
    "welcome": (
        "Envoyez-moi une photo, et un modèle vous dira ce qu'elle montre. Plusieurs photos envoyées ensemble reçoivent "
        "une réponse commune.\n\n"
        "/models – le modèle pour toutes vos photos, ou une question à chaque fois\n"
        "/style – la photo dont les autres prendront le style\n"
        "/status – ce qui est en attente et ce qui reste aujourd'hui\n"
        "/cancel – annuler ce qui est en attente\n"
        "/language – une autre langue"
    ),
    "not_allowed": "Ce bot n'est pas ouvert à tous. Son opérateur peut vous donner accès : votre numéro est {id}.",
    "send_photo": "Je ne peux utiliser que des photos. Envoyez-en une, ou voyez /help.",
    "choose": "Quel modèle ?",
    "choose_many": "Photos : {count}. Quel modèle ?",
    "choose_service": "Que dois-je en faire ?",
    "no_models": "Le serveur n'indique pas ses modèles pour le moment. Le menu suivra dès qu'il le fera.",
    "model_gone": "Ce modèle n'existe plus. Choisissez-en un autre.",
    "sending": "Envoi en cours…",
    "server_down": "Le serveur ne répond pas pour le moment. Votre photo est gardée ici et sera envoyée dès qu'il "
    "répondra.",
    "queued": "En file d'attente.",
    "queued_for": "En file d'attente, environ {time}.",
    "working": "En cours.",
    "working_part": "En cours : {percent} %.",
    "answered_of": "Réponses : {done} sur {count}.",
    "cancelled": "Annulé.",
    "cancelling": "Annulation en cours…",
    "too_late": "Le traitement a déjà commencé, la réponse va donc arriver.",
    "expired": "Vous n'avez rien choisi, cette photo a donc été écartée. Envoyez-la de nouveau.",
    "refused": "Le serveur ne peut pas l'utiliser : {reason}",
    "failed": "Cela a échoué : {reason}",
    "gave_up": "Le serveur n'a pas répondu pendant un jour. Envoyez la photo de nouveau.",
    "server_quota": "Le serveur n'accepte plus de photos aujourd'hui : {reason}",
    "quota": "Vous pouvez envoyer {count} photos par jour, et celles d'aujourd'hui sont épuisées. Le jour suivant "
    "commence à minuit UTC.",
    "too_many": "Trop de photos sont en attente dans cette discussion. Attendez des réponses, ou utilisez /cancel.",
    "too_large": "Ce fichier est trop grand. Je peux récupérer {size} Mo au plus.",
    "file_lost": "Telegram n'a plus cette photo. Envoyez-la de nouveau.",
    "answer_lost": "Le serveur n'a plus le résultat. Envoyez la photo de nouveau.",
    "unknown": "Aucune classe du modèle n'est probable.",
    "style_ask": "Envoyez la photo dont les suivantes prendront le style.",
    "style_set": "Un style est choisi. Pour le remplacer, envoyez maintenant une photo.",
    "style_saved": "C'est désormais votre style.",
    "style_removed": "Le style est retiré.",
    "style_needed": "Ce modèle a besoin d'un style. Envoyez la photo dont il doit prendre le style.",
    "model_question": "Quel modèle pour toutes vos photos ?",
    "model_set": "Désormais : {model}.",
    "model_each_time": "Désormais, je poserai la question pour chaque photo.",
    "status_none": "Rien n'est en attente.",
    "status_left": "Reste aujourd'hui : {count}.",
    "status_choosing": "attend votre choix",
    "cancel_none": "Il n'y a rien à annuler.",
    "language_question": "Quelle langue ?",
    "language_set": "Je parle maintenant français.",
    "old_button": "Ce bouton n'est plus valable.",
    "button_cancel": "Annuler",
    "button_back": "Retour",
    "button_ask": "Demander à chaque fois",
    "button_remove": "Retirer le style",
    "button_again": "Autre modèle",
}
SENTENCES = {"en": _ENGLISH, "de": _GERMAN, "es": _SPANISH, "fr": _FRENCH}


def say(language: str, name: str, **values: object) -> str:
    """Return a sentence. :raises KeyError: there is no such sentence or language."""
    return SENTENCES[language][name].format(**values)


def known_language(code: str | None) -> str:
    """Return the language of a user, as Telegram names it (`de-AT`), if the bot speaks it; else English."""
    short = (code or "").lower().partition("-")[0]
    return short if short in LANGUAGES else DEFAULT_LANGUAGE


def duration(seconds: float) -> str:
    """Write about how long something takes, in units that all languages share."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{round(seconds / 3600)} h"
